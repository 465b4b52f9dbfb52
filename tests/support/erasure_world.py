"""A small shop whose lakehouse is put back before each test of erasure, and a search that shares no code with the product's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import psycopg
import pytest

from app import sandbox
from app.erasure import erasure_context
from app.project import PROJECT
from lakehouse.engine.engine import Engine
from lakehouse.iceberg.catalog import Lake
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.privacy.context import ErasureContext
from pipelines.runner import open_engine, run_once
from pipelines.settings import Settings, load_settings
from pipelines.silver.users_scd import USERS_SCD

PARTS = ("warehouse", "catalog.db", "erasures", "erasure.key", "mlflow")


@dataclass(frozen=True)
class World:
    """A sandbox that runs, and the lakehouse made from it."""

    home: Path
    backup: Path
    settings: Settings

    def put_back(self) -> None:
        """The lakehouse as it was filled, and its replication slot. (Tables name their files by absolute paths, so it must be at
        the same place.)"""
        for part in PARTS:
            place, kept = self.home / part, self.backup / part
            shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
            if kept.is_dir():
                shutil.copytree(kept, place)
            elif kept.exists():
                shutil.copy2(kept, place)
        slot = self.settings.postgres.slot
        with psycopg.connect(self.settings.postgres.dsn.get_secret_value(), autocommit=True) as source:
            source.execute("SELECT pg_drop_replication_slot(%s)", [slot])
            source.execute("SELECT pg_copy_logical_replication_slot('kept', %s)", [slot])

    @property
    def lake(self) -> Lake:
        """The lakehouse, opened anew."""
        return Lake(self.settings)

    @property
    def without_postgres(self) -> World:
        """With that source switched off."""
        off = self.settings.postgres.model_copy(update={"enabled": False})
        return replace(self, settings=self.settings.model_copy(update={"postgres": off}))

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """As the commands have it."""
        with open_engine(self.settings) as engine:
            yield engine


def context_of(engine: Engine) -> ErasureContext:
    """Return the context of an erasure that reports no progress."""
    return erasure_context(engine, lambda stage, done, total: None)


@contextmanager
def shop(home: Path, orders: int, seed: int) -> Iterator[World]:
    """A shop of so many orders, its servers running."""
    sandbox.start(home, orders=orders, seed=seed)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHOPSPHERE_HOME", str(home))
            settings = load_settings()
        with open_engine(settings) as engine:
            done = run_once(engine, PROJECT, lambda name, report: None)
            assert not done.errors
        with psycopg.connect(settings.postgres.dsn.get_secret_value(), autocommit=True) as source:
            source.execute("SELECT pg_copy_logical_replication_slot(%s, 'kept')", [settings.postgres.slot])
        world = World(home, home.with_name(home.name + "-kept"), settings)
        world.backup.mkdir()
        for part in PARTS:
            if (home / part).is_dir():
                shutil.copytree(home / part, world.backup / part)
            elif (home / part).exists():
                shutil.copy2(home / part, world.backup / part)
        yield world
    finally:
        sandbox.stop(home)


def somebody(lake: Lake, rank: int = 0) -> dict[str, str]:
    """A person with an account, an e-mail, a phone, an address, and marketplace orders; the `rank`th by number of records."""
    people = lake.load(CUSTOMER_360).read(["master_user_id", "records", "accounts", "orders", "primary_user_id", "email"])
    users = lake.load(USERS_SCD).read(
        ["user_id", "email", "email_raw", "phone_number", "phone_raw", "name", "address", "city"], pl.col("is_current")
    )
    both = (
        people.filter(pl.col("accounts") >= 1, pl.col("orders") >= 2)
        .drop("email")
        .join(users, left_on="primary_user_id", right_on="user_id")
    )
    both = both.drop_nulls(["email", "phone_number", "address"]).sort("records", "master_user_id", descending=[True, False])
    row = both.row(rank, named=True)
    return {name: str(value) for name, value in row.items() if value is not None}


def texts_of(person: dict[str, str]) -> list[str]:
    """What must not be found of a person."""
    texts = [person[name] for name in ("email", "email_raw", "phone_number", "phone_raw", "address") if name in person]
    return [*texts, person["name"]]


def holding(home: Path, texts: list[str]) -> list[str]:
    """The files of a local warehouse that hold one of the texts, decoded: read whole and looked through in lower case."""
    found = []
    lower = [text.lower() for text in texts] + [json.dumps(text)[1:-1].lower() for text in texts]
    for file in sorted((home / "warehouse").rglob("*")):
        if not file.is_file():
            continue
        held = file.read_bytes().decode("latin-1").lower()
        if file.suffix == ".parquet":
            rows = pl.read_parquet(file)
            for column in rows.get_columns():
                if column.dtype == pl.Binary:
                    held += "\n".join((value or b"").decode("utf-8", "replace") for value in column.to_list()).lower()
                elif column.dtype == pl.String:
                    held += "\n".join(value or "" for value in column.to_list()).lower()
        if any(text in held for text in lower):
            found.append(str(file))
    return found
