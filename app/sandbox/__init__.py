"""The sandbox: real source servers on this machine, and a shop inside them.

`start` starts PostgreSQL, a MongoDB-wire server and a Kafka-protocol broker, fills them (a seeded shop, a
file of real invoices, or nothing) and writes their addresses into the settings file. `step` lets time go on,
`stop` ends the servers, `truth` reads the ground truth that is kept beside the shop and never in its sources.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pymongo.errors
import tomli_w
from confluent_kafka import KafkaException

from app.sandbox import filling, online_retail
from app.sandbox.schema import create_sources
from app.sandbox.servers import (
    LOOPBACK,
    WAY_OUT,
    Addresses,
    any_running,
    running,
    sandbox_directory,
    start_servers,
    stop_servers,
)
from app.sandbox.sink import TRUTH
from lakehouse.errors import SandboxError

__all__ = ["Addresses", "running", "start", "step", "stop", "truth"]

Report = Callable[[str, int, int], None]


def start(
    home: Path,
    *,
    orders: int = 20_000,
    seed: int = 7,
    source_file: Path | None = None,
    empty: bool = False,
    base_currency: str = "USD",
    host: str = LOOPBACK,
    progress: Report | None = None,
) -> Addresses:
    """Start the servers, fill them, and write the settings file; returns the addresses.

    A sandbox that was stopped is started again with its data, when the same content is asked for. A start
    that fails or is interrupted leaves no servers behind. Raises SandboxError.
    """
    running_now = any_running(home)
    if running_now:
        raise SandboxError(f"A sandbox is running already ({', '.join(running_now)}). Stop it first: `{WAY_OUT}`.")
    if source_file is not None:
        base_currency = online_retail.CURRENCY
        online_retail.check(source_file)
    elif not empty and orders < 1:
        raise SandboxError(f"A shop needs at least one order, not {orders}; give --orders 1 or more, or --empty.")
    directory = sandbox_directory(home)
    wanted = _content(orders, seed, source_file, empty, base_currency)
    filled = _filled(directory)
    if filled is not None and filled != wanted:
        raise SandboxError(
            f"{directory} holds another sandbox ({_named(filled)}), stopped. Start it with the same options, remove that "
            f"directory together with the lakehouse made from it, or use another SHOPSPHERE_HOME."
        )
    if filled is None:
        # What a start that was cut off has left is of no use.
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    before = _raise_on_sigterm()
    try:
        addresses = start_servers(home, (lambda name: progress(name, 0, 1)) if progress else None, host)
        if filled is None:
            create_sources(addresses)
            if source_file is not None:
                online_retail.load(addresses, source_file, progress)
            elif not empty:
                filling.fill(addresses, directory, orders, seed, base_currency, progress)
            _write_json(directory / "content.json", wanted)
        write_settings(home, addresses, base_currency)
    except (psycopg.Error, pymongo.errors.PyMongoError, KafkaException, OSError) as error:
        stop_servers(home)
        raise SandboxError(f"The sandbox cannot be filled: {_one_line(error)}. Its servers have been stopped again.") from error
    except SandboxError as error:
        stop_servers(home)
        raise SandboxError(f"{str(error).rstrip('.')}. The sandbox's servers have been stopped again.") from error
    except BaseException:
        stop_servers(home)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return addresses


def step(home: Path, orders: int, progress: Report | None = None) -> Addresses:
    """Let the shop's time go on by so many orders. Raises SandboxError."""
    addresses = running(home)
    if addresses is None:
        raise SandboxError("No sandbox is running; start one first: `python -m app sandbox start`.")
    directory = sandbox_directory(home)
    if not (directory / "shop.json.gz").exists():
        raise SandboxError("This sandbox was filled from a file, or not at all; only the seeded shop can go on by itself.")
    if orders < 1:
        raise SandboxError(f"A step needs at least one order, not {orders}.")
    try:
        filling.go_on(addresses, directory, orders, progress)
    except (psycopg.Error, pymongo.errors.PyMongoError, KafkaException, OSError) as error:
        raise SandboxError(f"The sandbox cannot go on: {_one_line(error)}.") from error
    return addresses


def stop(home: Path) -> list[str]:
    """Stop the servers; returns the names of those that ran. Data stays for the next start. Raises SandboxError."""
    return stop_servers(home)


def truth(home: Path) -> dict[str, pl.DataFrame]:
    """The ground truth: `people` (person, record_id), `fraud` (order_id, kind, ring), `thefts`; empty when there is none."""
    directory = sandbox_directory(home) / "truth"
    return {
        what: pl.concat(
            [pl.DataFrame(schema=schema), *(pl.read_parquet(file) for file in sorted(directory.glob(f"{what}-*.parquet")))]
        )
        for what, schema in TRUTH.items()
    }


def write_settings(home: Path, addresses: Addresses, base_currency: str) -> Path:
    """Put the addresses into `<home>/shopsphere.toml`; every other setting there stays."""
    file = home.expanduser().absolute() / "shopsphere.toml"
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text()) if file.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise SandboxError(f"{file} is not valid TOML ({error}); correct it, or remove it.") from None
    content["base_currency"] = base_currency
    # the shop's last day is long ago
    content.setdefault("freshness", False)
    content["postgres"] = content.get("postgres", {}) | {"dsn": addresses.postgres_dsn}
    content["mongo"] = content.get("mongo", {}) | {"uri": addresses.mongo_uri}
    content["kafka"] = content.get("kafka", {}) | {"bootstrap_servers": addresses.kafka_bootstrap}
    temporary = file.with_suffix(".toml.new")
    # It holds a password.
    temporary.touch(mode=0o600)
    temporary.write_text(tomli_w.dumps(content))
    os.replace(temporary, file)
    return file


def _raise_on_sigterm() -> Any:
    """Let SIGTERM end the start as an interruption does, so that it cleans up; returns the handler there was."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    return signal.signal(signal.SIGTERM, end)


def _content(orders: int, seed: int, source_file: Path | None, empty: bool, base_currency: str) -> dict[str, Any]:
    if source_file is not None:
        return {"file": str(source_file.expanduser().absolute()), "base_currency": base_currency}
    return (
        {"empty": True, "base_currency": base_currency}
        if empty
        else {"orders": orders, "seed": seed, "base_currency": base_currency}
    )


def _named(content: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in content.items())


def _filled(directory: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((directory / "content.json").read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise SandboxError(f"{directory / 'content.json'} cannot be read ({error}); remove {directory}.") from None
    return dict(found)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)


def _one_line(error: BaseException) -> str:
    # pymongo's bulk errors quote whole documents, which hold people's data.
    if isinstance(error, pymongo.errors.BulkWriteError):
        return f"the MongoDB-wire server refused {len((error.details or {}).get('writeErrors', []))} documents"
    return " ".join(str(error).split())[:300] or type(error).__name__
