"""Bronze rows for the identity tests, and an identity graph that is maintained in memory as the engine would."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import polars as pl

from lakehouse.step import Grouped, Lookup
from lakehouse.table import Table
from pipelines.bronze.tables import MARKETPLACE_ORDERS, ORDERS, USERS
from pipelines.settings import BusinessSettings
from pipelines.silver.identity_graph import DEFAULT_SETTINGS, IDENTITY_GRAPH, STEP, expand

START = datetime(2025, 1, 1, tzinfo=UTC)
BRONZE = {"users": USERS, "orders": ORDERS, "marketplace": MARKETPLACE_ORDERS}


def schema(table: Table) -> dict[str, Any]:
    empty = pl.from_arrow(table.schema.empty_table())
    assert isinstance(empty, pl.DataFrame)
    return dict(empty.schema)


def moment(number: int) -> datetime:
    return START + timedelta(hours=number)


def user(user_id: int, at: int = 0, op: str = "r", position: int | None = None, **values: Any) -> tuple[str, dict[str, Any]]:
    """Return a version of an account. at: hours after START, also of created_at unless it is given."""
    row = {
        "email_verified": False,
        "phone_verified": False,
        "country": "ID",
        "created_at": moment(0 if op != "r" else at),
        "updated_at": moment(at),
    }
    row = {} if op == "d" else row | values
    return "users", row | {
        "user_id": user_id,
        "_op": op,
        "_source_position": f"{at if position is None else position:016X}/0000000000",
        "_source_time": moment(at),
        "_ingested_at": moment(9999),
    }


def web_order(order_id: int, user_id: int | None, at: int = 0, op: str = "c", **values: Any) -> tuple[str, dict[str, Any]]:
    row = {"order_id": order_id, "user_id": user_id, "source": "web", "created_at": moment(at), **values}
    return "orders", row | {
        "_op": op,
        "_source_position": f"{at:016X}/0000000001",
        "_source_time": moment(at),
        "_ingested_at": moment(9999),
    }


def document(
    order: str, at: int = 0, op: str = "c", document_id: str | None = None, platform: str = "tokopedia", **values: Any
) -> tuple[str, dict[str, Any]]:
    """Return a version of a marketplace document; op 'd' deletes it."""
    row: dict[str, Any] = {
        "document_id": document_id or f"doc-{order}",
        "_op": op,
        "_source_position": f"{at:016d}/{document_id or order}",
        "_source_time": moment(at),
        "_ingested_at": moment(9999),
    }
    if op == "d":
        return "marketplace", row
    stamp = {"$date": {"$numberLong": str(int(moment(at).timestamp() * 1000))}}
    body = {
        "_id": row["document_id"],
        "mp_order_id": order,
        "platform": platform,
        "order_time": stamp,
        "updated_at": stamp,
        **values,
    }
    return "marketplace", row | {"platform": platform, "mp_order_id": order, "document": json.dumps(body)}


def truncated(name: str, at: int) -> tuple[str, dict[str, Any]]:
    """Return the row of a truncated source table, or a dropped collection."""
    position = f"{at:016d}/~" if name == "marketplace" else f"{at:016X}/9999999999"
    return name, {"_op": "t", "_source_position": position, "_source_time": moment(at), "_ingested_at": moment(9999)}


@dataclass
class GraphInMemory:
    """Bronze rows in order of arrival, and the identity graph that STEP computes from them.

    recomputed: number of groups that the last run recomputed
    """

    context: BusinessSettings = DEFAULT_SETTINGS
    bronze: dict[str, pl.DataFrame] = field(
        default_factory=lambda: {name: pl.DataFrame(schema=schema(table)) for name, table in BRONZE.items()}
    )
    graph: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=schema(IDENTITY_GRAPH)))
    built: bool = False
    recomputed: int = 0

    def run(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> GraphInMemory:
        """Append bronze rows and update the graph."""
        by_table: dict[str, list[Mapping[str, Any]]] = {name: [] for name in BRONZE}
        for name, row in rows:
            by_table[name].append(row)
        return self.run_frames({name: pl.DataFrame(each, schema=schema(BRONZE[name])) for name, each in by_table.items()})

    def run_frames(self, new: Mapping[str, pl.DataFrame]) -> GraphInMemory:
        self.bronze = {name: pl.concat([frame, new[name]]) if name in new else frame for name, frame in self.bronze.items()}
        if not self.built or any((frame["_op"] == "t").any() for frame in new.values()):
            self.built = True
            known = self.graph.select("record_id")
            self._replace(pl.concat([self._affected(self.bronze), known]).unique(), whole=True)
            return self
        affected = self._affected(new)
        if affected.is_empty():
            return self
        self._replace(expand(affected, self.lookup, self.context), whole=False)
        return self

    def rebuilt(self) -> pl.DataFrame:
        """Return the graph after a rebuild."""
        return GraphInMemory(self.context).run_frames(self.bronze).graph

    def lookup(self, table: Table, columns: Sequence[str], predicate: pl.Expr) -> pl.DataFrame:
        """Read rows as an engine's `ReadRows` does."""
        frame = self.graph if table.name == IDENTITY_GRAPH.name else self._rows(table)
        return frame.filter(predicate).select(columns)

    def _rows(self, table: Table) -> pl.DataFrame:
        return next(self.bronze[name] for name, each in BRONZE.items() if each.name == table.name)

    def _affected(self, new: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
        parts = [pl.DataFrame(schema={"record_id": pl.String})]
        for read in STEP.reads.values():
            frame = next((new[name] for name, each in BRONZE.items() if each.name == read.table.name and name in new), None)
            if frame is None:
                continue
            if isinstance(read, Grouped):
                parts.append(frame.select(read.keys[0][0].alias("record_id")))
                if read.resolve:
                    earlier = self._rows(read.table).join(frame.select(read.resolve), on=list(read.resolve), how="semi")
                    parts.append(earlier.select(read.keys[0][0].alias("record_id")))
            elif isinstance(read, Lookup) and read.affects and read.through:
                rows = self._rows(read.through).filter(read.affects(frame))
                parts.append(rows.select(read.affected_keys[0].alias("record_id")))
        return pl.concat(parts).drop_nulls().unique()

    def _replace(self, groups: pl.DataFrame, whole: bool) -> None:
        self.recomputed = groups.height
        frames = {"groups": groups, "old": self.graph.join(groups, on="record_id", how="semi")}
        for name, read in STEP.reads.items():
            frame = self._rows(read.table)
            if isinstance(read, Grouped) and not whole:
                is_truncate = frame["_op"] == "t"
                chosen = frame.filter(read.keys[0][0].is_in(groups["record_id"].implode()))
                if read.resolve:
                    chosen = frame.join(chosen.select(read.resolve), on=list(read.resolve), how="semi")
                frame = pl.concat([chosen, frame.filter(is_truncate)])
            elif isinstance(read, Lookup):
                frame = frame.filter(pl.col(read.on).is_in(read.values(frames).unique().implode()))
            frames[name] = frame.select(read.columns)  # type: ignore[union-attr]
        result = STEP.transform(frames, self.context).select(self.graph.columns).cast(self.graph.schema)  # type: ignore[arg-type]
        result = result.join(groups, on="record_id", how="semi")
        self.graph = pl.concat([self.graph.join(groups, on="record_id", how="anti"), result])


def masters(graph: pl.DataFrame) -> dict[str, str]:
    """Return the master user of each record."""
    own = graph.filter(pl.col("kind") == "self")
    return dict(own.select("record_id", "master_user_id").iter_rows())


def sorted_rows(graph: pl.DataFrame) -> list[tuple[Any, ...]]:
    return sorted(graph.iter_rows(), key=repr)


FIRST = (
    "Budi",
    "Siti",
    "Agus",
    "Dewi",
    "Rizky",
    "Putri",
    "Andi",
    "Rina",
    "Joko",
    "Wulan",
    "Hendra",
    "Maya",
    "Fajar",
    "Indah",
    "Bayu",
    "Ratna",
)
LAST = (
    "Santoso",
    "Wijaya",
    "Saputra",
    "Hidayat",
    "Nugroho",
    "Kusuma",
    "Pratama",
    "Setiawan",
    "Halim",
    "Gunawan",
    "Siregar",
    "Nasution",
)
STREETS = ("Merdeka", "Sudirman", "Diponegoro", "Gajah Mada", "Ahmad Yani", "Pahlawan", "Melati", "Mawar")


def shop(people: int, seed: int) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
    """Return bronze rows of a small shop, and the person of each record.

    The shop has households that share an address, phone or device, people with several accounts, typing errors, and an address
    and an e-mail address shared by a crowd.
    """
    random = Random(seed)
    rows: list[tuple[str, dict[str, Any]]] = []
    truth: dict[str, str] = {}
    at = 0
    for number in range(people):
        home = Random(seed * 1_000 + number // 3)
        shared = home.random() < 0.4
        source = home if shared else random
        last = source.choice(LAST)
        address = (
            "Menara Satu, Jl. Thamrin 10"
            if number % 15 == 0
            else f"Jl. {source.choice(STREETS)} No. {source.randrange(1, 400)}, {source.randrange(10000, 90000)} Bandung"
        )
        household_device = f"home-{number // 3}"
        first = FIRST[(number * 5 + number // 16) % len(FIRST)]
        name = f"{first} {last}"
        email, other = f"{first}.{last}{number}@mail.example".lower(), f"{first[0]}{last}{number}@post.example".lower()
        phone = f"08123{number:07d}"
        accounts = [1000 + number * 3 + n for n in range(random.choice((0, 1, 1, 1, 2)))]
        for n, user_id in enumerate(accounts):
            at += 1
            rows.append(
                user(
                    user_id,
                    at=at,
                    name=name,
                    email=(email, other)[n],
                    email_verified=random.random() < 0.7,
                    phone_number=phone if random.random() < 0.8 or n else None,
                    phone_verified=random.random() < 0.5,
                    address=address,
                    city="Bandung",
                )
            )
            rows.append(
                web_order(at, user_id, at=at, device_id=household_device if shared and random.random() < 0.5 else f"d-{number}")
            )
            truth[f"user:{user_id}"] = f"p{number}"
        for n in range(random.randrange(0, 5)):
            at += 1
            shown: dict[str, Any] = {"buyer_name": with_typing_error(random, name) if random.random() < 0.08 else name.upper()}
            style = random.random()
            if style < 0.8:
                shown |= {
                    "user_email": email if random.random() < 0.8 else "noreply@market.example",
                    "buyer_phone": f"+62 812-3{number:07d}",
                }
            else:
                shown["user_email"] = email if number % 15 == 0 else None
            if style > 0.3 or shown["user_email"] is None:
                respelled = address.replace("Jl.", "Jalan").replace("No. ", "")
                shown["shipping_address"] = with_typing_error(random, address) if random.random() < 0.08 else respelled
            rows.append(document(f"{number}-{n}", at=at, **shown))
            truth[f"order:tokopedia:{number}-{n}"] = f"p{number}"
    return rows, truth


def with_typing_error(random: Random, text: str) -> str:
    """Return the text with a typing error."""
    at = random.randrange(1, len(text) - 2)
    return random.choice(
        (text[:at] + text[at + 1 :], text[:at] + text[at] + text[at:], text[:at] + text[at + 1] + text[at] + text[at + 2 :])
    )
