"""The sandbox: source servers on this machine with generated retail data.

`start` starts PostgreSQL, a MongoDB-compatible server and a Kafka-compatible broker, loads data (a generated history, a file of
real invoices, or nothing) and writes their addresses into the settings file. `step` simulates more orders, `stop` stops
the servers, `truth` reads the ground truth, which is stored next to the servers and never in them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pymongo.errors
import tomli_w
from confluent_kafka import KafkaException

from app.sandbox import history, online_retail
from app.sandbox.schema import create_sources
from app.sandbox.servers import (
    LOOPBACK,
    STOP_COMMAND,
    Addresses,
    ShowProgress,
    any_running,
    running,
    sandbox_directory,
    start_servers,
    stop_servers,
)
from app.sandbox.sink import TRUTH
from lakehouse.errors import SandboxError

__all__ = ["Addresses", "running", "start", "step", "stop", "truth"]

SERVER_ERRORS = (psycopg.Error, pymongo.errors.PyMongoError, KafkaException, OSError)


def start(
    home: Path,
    *,
    orders: int = 20_000,
    seed: int = 7,
    source_file: Path | None = None,
    empty: bool = False,
    base_currency: str = "USD",
    host: str = LOOPBACK,
    progress: ShowProgress | None = None,
) -> Addresses:
    """Start the servers, load data, write the settings file, and return the addresses.

    A stopped sandbox is started with its data if the same content is requested. A start that fails or is interrupted leaves
    no servers behind. Raises SandboxError.
    """
    if names := any_running(home):
        raise SandboxError(f"A sandbox is already running ({', '.join(names)}). Stop it first: `{STOP_COMMAND}`.")
    if source_file is not None:
        base_currency = online_retail.CURRENCY
        online_retail.check(source_file)
    elif not empty and orders < 1:
        raise SandboxError(f"{orders} orders cannot be generated. Set --orders to 1 or more, or use --empty.")
    directory = sandbox_directory(home)
    requested = _content(orders, seed, source_file, empty, base_currency)
    loaded = _loaded_content(directory)
    if loaded is not None and loaded != requested:
        raise SandboxError(
            f"{directory} contains another, stopped sandbox ({_as_text(loaded)}). Start it with the same options, remove that "
            f"directory together with the lakehouse built from it, or use another SHOPSPHERE_HOME."
        )
    if loaded is None:
        # an interrupted start may have left incomplete data
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    with _stopped_on_error(home):
        addresses = start_servers(home, (lambda name: progress(name, 0, 1)) if progress else None, host)
        if loaded is None:
            create_sources(addresses)
            if source_file is not None:
                online_retail.load(addresses, source_file, progress)
            elif not empty:
                history.fill(addresses, directory, orders, seed, base_currency, progress)
            _write_json(directory / "content.json", requested)
        write_settings(home, addresses, base_currency)
    return addresses


@contextmanager
def _stopped_on_error(home: Path) -> Iterator[None]:
    """Stop the servers when the block fails or is interrupted, also by SIGTERM. Raises SandboxError for their errors."""
    previous = _raise_on_sigterm()
    try:
        yield
    except SERVER_ERRORS as error:
        stop_servers(home)
        raise SandboxError(f"Loading the sandbox failed: {_one_line(error)}. Its servers have been stopped.") from error
    except SandboxError as error:
        stop_servers(home)
        raise SandboxError(f"{str(error).rstrip('.')}. The sandbox's servers have been stopped.") from error
    except BaseException:
        stop_servers(home)
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def step(home: Path, orders: int, progress: ShowProgress | None = None) -> Addresses:
    """Simulate more orders and return the addresses. Raises SandboxError."""
    addresses = running(home)
    if addresses is None:
        raise SandboxError("No sandbox is running. Start one first: `python -m app sandbox start`.")
    directory = sandbox_directory(home)
    if not (directory / "shop.json.gz").exists():
        raise SandboxError("This sandbox was loaded from a file or started empty; only a generated history can be continued.")
    if orders < 1:
        raise SandboxError(f"{orders} orders cannot be simulated. Set --orders to 1 or more.")
    try:
        history.simulate_more(addresses, directory, orders, progress)
    except SERVER_ERRORS as error:
        raise SandboxError(f"Simulating more orders failed: {_one_line(error)}.") from error
    return addresses


def stop(home: Path) -> list[str]:
    """Stop the servers and return the names of those that ran. Their data is kept. Raises SandboxError."""
    return stop_servers(home)


def truth(home: Path) -> dict[str, pl.DataFrame]:
    """Return the ground truth: `people` (person, record_id), `fraud` (order_id, kind, ring), `thefts`. Empty without one."""
    directory = sandbox_directory(home) / "truth"
    return {
        kind: pl.concat(
            [pl.DataFrame(schema=schema), *(pl.read_parquet(file) for file in sorted(directory.glob(f"{kind}-*.parquet")))]
        )
        for kind, schema in TRUTH.items()
    }


def write_settings(home: Path, addresses: Addresses, base_currency: str) -> Path:
    """Write the addresses into `<home>/shopsphere.toml`, keep every other setting, and return the file."""
    file = home.expanduser().absolute() / "shopsphere.toml"
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text()) if file.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise SandboxError(f"{file} is not valid TOML ({error}). Correct or remove it.") from None
    content["base_currency"] = base_currency
    # the generated history ended long ago, so it would always count as stale
    content.setdefault("freshness", False)
    content["postgres"] = content.get("postgres", {}) | {"dsn": addresses.postgres_dsn}
    content["mongo"] = content.get("mongo", {}) | {"uri": addresses.mongo_uri}
    content["kafka"] = content.get("kafka", {}) | {"bootstrap_servers": addresses.kafka_bootstrap}
    temporary = file.with_suffix(".toml.new")
    # created with its final permissions, because it contains a password
    temporary.touch(mode=0o600)
    temporary.write_text(tomli_w.dumps(content))
    os.replace(temporary, file)
    return file


def _raise_on_sigterm() -> Any:
    """Raise SystemExit on SIGTERM, so that a start cleans up; return the previous handler."""
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


def _as_text(content: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in content.items())


def _loaded_content(directory: Path) -> dict[str, Any] | None:
    """Return the description of the loaded data, or None when loading has not finished."""
    try:
        content = json.loads((directory / "content.json").read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise SandboxError(f"{directory / 'content.json'} cannot be read ({error}). Remove {directory}.") from None
    return dict(content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)


def _one_line(error: BaseException) -> str:
    # pymongo's bulk errors quote whole documents, which contain personal data
    if isinstance(error, pymongo.errors.BulkWriteError):
        return f"the MongoDB-compatible server refused {len((error.details or {}).get('writeErrors', []))} documents"
    return " ".join(str(error).split())[:300] or type(error).__name__
