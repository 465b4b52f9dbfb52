"""A small shop whose lakehouse is restored before each test of erasure, and a search that shares no code with the product."""

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

LAKEHOUSE_FILES = ("warehouse", "catalog.db", "erasures", "erasure.key", "mlflow")


@dataclass(frozen=True)
class World:
    """A running sandbox and its lakehouse, with a backup of the lakehouse."""

    home: Path
    backup: Path
    settings: Settings

    def restore(self) -> None:
        """Restore the lakehouse and its replication slot. Tables name their files by absolute paths, so the place is the same."""
        for part in LAKEHOUSE_FILES:
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
        """Return the lakehouse, newly opened."""
        return Lake(self.settings)

    @property
    def without_postgres(self) -> World:
        """Return the world with PostgreSQL disabled."""
        off = self.settings.postgres.model_copy(update={"enabled": False})
        return replace(self, settings=self.settings.model_copy(update={"postgres": off}))

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Open an engine as the commands do."""
        with open_engine(self.settings) as engine:
            yield engine


def context_of(engine: Engine) -> ErasureContext:
    """Return the context of an erasure that reports no progress."""
    return erasure_context(engine, lambda stage, done, total: None)


@contextmanager
def shop(home: Path, orders: int, seed: int) -> Iterator[World]:
    """Yield a shop with that many orders, its servers running."""
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
        for part in LAKEHOUSE_FILES:
            if (home / part).is_dir():
                shutil.copytree(home / part, world.backup / part)
            elif (home / part).exists():
                shutil.copy2(home / part, world.backup / part)
        yield world
    finally:
        sandbox.stop(home)


def find_customer(lake: Lake, rank: int = 0) -> dict[str, str]:
    """Return a customer with an account, e-mail, phone, address and at least two orders: the `rank`th by number of records."""
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


def personal_texts(person: dict[str, str]) -> list[str]:
    """Return the texts of a person that an erasure has to remove."""
    texts = [person[name] for name in ("email", "email_raw", "phone_number", "phone_raw", "address") if name in person]
    return [*texts, person["name"]]


def files_containing(home: Path, texts: list[str]) -> list[str]:
    """Return the files of a local warehouse that contain one of the texts: decoded and compared in lower case."""
    found = []
    lower = [text.lower() for text in texts] + [json.dumps(text)[1:-1].lower() for text in texts]
    for file in sorted((home / "warehouse").rglob("*")):
        if not file.is_file():
            continue
        content = file.read_bytes().decode("latin-1").lower()
        if file.suffix == ".parquet":
            rows = pl.read_parquet(file)
            for column in rows.get_columns():
                if column.dtype == pl.Binary:
                    content += "\n".join((value or b"").decode("utf-8", "replace") for value in column.to_list()).lower()
                elif column.dtype == pl.String:
                    content += "\n".join(value or "" for value in column.to_list()).lower()
        if any(text in content for text in lower):
            found.append(str(file))
    return found
