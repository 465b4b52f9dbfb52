"""The end of the demo: serving is started, asked about two orders and a product over HTTP, and stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import polars as pl
import psutil

from app.cli.output import Output
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED

ROOT = Path(__file__).resolve().parents[2]
PORTS = range(18_000, 19_000)
READY_SECONDS = 120.0
STOP_SECONDS = 60.0
"""Beyond the time that requests under way may take."""
REST_SECONDS = 15.0
"""For what it started, after its own end."""
ASK_SECONDS = 15.0
SHOWN_REASONS, SHOWN_STORES = 3, 3
LATER = timedelta(minutes=10)
"""How long after the last order of a ring its next one comes."""
ASKED_AS = ("currency", "payment_method", "card_fingerprint", "ip_address", "device_id", "shipping_address", "store_id")


@dataclass(frozen=True)
class Request:
    """An order to be scored, and what it is."""

    title: str
    told: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class LiveAnswers:
    """What was asked over HTTP, and the answers as they came."""

    scores: tuple[tuple[Request, Mapping[str, Any]], ...]
    stock: Mapping[str, Any]
    without_model: bool = False
    """No model passed the gate, so that no order could be scored."""


class DemoError(ShopSphereError):
    """Serving did not start, or did not answer."""


# --- what is asked


def requests(lake: Lake, fraud: pl.DataFrame) -> tuple[Request, ...]:
    """The next order of the newest ring of fraudsters, and a regular customer's; as far as the shop has such.

    fraud: the ground truth (order_id, kind, ring), which the lakehouse never sees.
    """
    orders = lake.load(ORDERS_UNIFIED).read(["order_id", "user_id", "channel", "placed_at", "total_amount", *ASKED_AS])
    web = orders.filter((pl.col("channel") == "web") & (pl.col("payment_method") == "card")).drop_nulls("user_id")
    web = web.join(fraud, on="order_id", how="left").sort("placed_at", "order_id")
    if web.is_empty():
        return ()
    found = []
    rings = web.filter(pl.col("kind") == "ring")
    if not rings.is_empty():
        last = rings[-1]
        again = rings.filter(pl.col("ring") == last["ring"][0])
        found.append(
            Request(
                "A fraudulent order",
                f"the next one of a ring that ordered {again.height} times: its account, device, card and address again",
                _body("demo-fraud", last, _lines(lake, last), last["placed_at"][0] + LATER),
            )
        )
    # whoever was defrauded shares a device or card with the fraudster, and is no example of a regular
    touched = web.filter(pl.col("kind").is_not_null())
    honest = web.filter(pl.all_horizontal(~pl.col(name).is_in(touched[name].implode()) for name in ("user_id", *ASKED_AS[2:5])))
    if not honest.is_empty():
        often = honest.group_by("user_id").agg(pl.len().alias("orders")).sort("orders", "user_id", descending=[True, False])
        own = honest.filter(pl.col("user_id") == often["user_id"][0])
        found.append(
            Request(
                "An honest order",
                f"a customer with {own.height} orders on the web buys again what the last one was",
                _body("demo-honest", own[-1], _lines(lake, own[-1]), orders["placed_at"].max()),
            )
        )
    return tuple(found)


def _lines(lake: Lake, order: pl.DataFrame) -> pl.DataFrame:
    lines = lake.load(ORDER_ITEMS_UNIFIED).read(
        ["order_id", "line_no", "product_id", "quantity", "unit_price"], pl.col("order_id") == order["order_id"][0]
    )
    return lines.filter(pl.col("quantity") > 0).sort("line_no")


def _body(order_id: str, like: pl.DataFrame, lines: pl.DataFrame, at: datetime) -> dict[str, Any]:
    """The order as the checkout would send it."""
    row = like.row(0, named=True)
    return {
        "order_id": order_id,
        "user_id": row["user_id"],
        "total_amount": f"{row['total_amount']:f}",
        "created_at": at.isoformat(),
        "items": [
            {"product_id": product, "quantity": quantity, "unit_price": f"{price:f}"}
            for product, quantity, price in lines.select("product_id", "quantity", "unit_price").iter_rows()
        ],
        **{name: row[name] for name in ASKED_AS},
    }


def product_to_look_up(lake: Lake) -> str:
    """The product sold in most lines. Raises DemoError when nothing was sold."""
    lines = lake.load(ORDER_ITEMS_UNIFIED).read(["order_id", "product_id"]).drop_nulls("product_id")
    if lines.is_empty():
        raise DemoError("The shop has sold nothing, so there is no product to look up. Give more orders: --orders 20000.")
    return str(lines["product_id"].value_counts().sort("count", "product_id", descending=[True, False])["product_id"][0])


# --- serving


@contextlib.contextmanager
def serving(home: Path) -> Iterator[str]:
    """`python -m app serve` on a free port of loopback, until the end of the block: its address, once it is ready.

    However the block ends, also by SIGTERM, serving is told to end, and what does not end is killed. Raises DemoError.
    """
    port = _free_port()
    log = home / "logs" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SHOPSPHERE_HOME": str(home.absolute())}
    address = f"http://127.0.0.1:{port}"
    with _ended_by_sigterm(), log.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--host", "127.0.0.1", "--port", str(port), "--replicas", "1"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends it
        )
        try:
            _wait_ready(process, address, log)
            yield address
        finally:
            _end(process)


def _free_port() -> int:
    """Below the ports that the system hands out: Ray's own servers take those while it starts."""
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DemoError(f"No port of 127.0.0.1 from {PORTS[0]} to {PORTS[-1]} is free to serve on. End what listens there.")


def _wait_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until, last = time.monotonic() + READY_SECONDS, "no answer yet"
    while time.monotonic() < until:
        if (code := process.poll()) is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            errors = [line for line in lines if line.startswith("error:")] or lines
            raise DemoError(f"Serving ended with exit code {code} before it was ready: {errors[-1][:300]} (all of it: {log})")
        try:
            ask(f"{address}/-/readyz", seconds=5)
            return
        except DemoError as error:
            last = str(error)
        time.sleep(0.3)
    raise DemoError(f"Serving was not ready after {READY_SECONDS:.0f} s: {last[:300]} See {log}.")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it answer what is under way and end; after that time kill it with all that it started."""
    if process.poll() is not None:
        return
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Ray's own processes end a little after the one that started them
    for one in psutil.wait_procs(family, REST_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds, as Ctrl-C does, so that what was started is ended."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ask(url: str, body: Mapping[str, Any] | None = None, seconds: float = ASK_SECONDS) -> dict[str, Any]:
    """GET, or POST of a body, as JSON. Raises DemoError with what was answered instead."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        raise DemoError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DemoError(f"{url} does not answer: {error}") from None
    try:
        return dict(json.loads(text))
    except ValueError:
        # liveness and readiness are words
        return {"text": text.decode(errors="replace")}


# --- both


def ask_live(
    home: Path, orders: tuple[Request, ...], product: str, *, model: bool, show: Callable[[str, int, int], None]
) -> LiveAnswers:
    """Start serving, ask, stop it. model: whether there is a champion to score with."""
    show("serving", 0, 1)
    with serving(home) as address:
        scores = tuple((one, ask(f"{address}/v1/fraud/score", one.body)) for one in orders) if model else ()
        stock = ask(f"{address}/v1/inventory/{product}")
    show("serving", 1, 1)
    return LiveAnswers(scores, stock, not model)


def print_answered(output: Output, answered: LiveAnswers) -> None:
    """Each question in a line, then its answer in words."""
    if answered.without_model:
        output.say(
            "   No model passed the gate, so no order is scored. A larger shop has more frauds to learn from: --orders 20000."
        )
    for request, told in answered.scores:
        body = request.body
        output.say(f"\n   {request.title}: {request.told}")
        output.say(
            f"   POST /v1/fraud/score  order {body['order_id']}, {len(body['items'])} lines, "
            f"{body['total_amount']} {body['currency']}, user {body['user_id']}, device {body['device_id']}"
        )
        output.say(
            f"   -> score {told['score']:.4f} (threshold {told['threshold']:.4f}): {told['decision']}, "
            f"by {told['model']['name']} version {told['model']['version']}, {told['staleness_ms']} ms stale"
        )
        for reason in told["reasons"][:SHOWN_REASONS]:
            output.say(f"      {reason['contribution']:+.2f}  {reason['text']}")
    stock = answered.stock
    output.say(f"\n   GET /v1/inventory/{stock['product_id']}")
    output.say(f"   -> as of {stock['as_of']}, {stock['staleness_ms']} ms stale, in {len(stock['stores'])} stores, of them")
    for level in stock["stores"][:SHOWN_STORES]:
        low = ", low" if level["low_stock"] else ""
        output.say(
            f"      {level['store_id']}: {level['on_hand']:,} on hand, {level['reserved']:,} reserved, "
            f"{level['available_to_promise']:,} to promise{low}"
        )


def as_json(answered: LiveAnswers) -> dict[str, Any]:
    """Requests and answers."""
    return {
        "scores": [{"what": one.title, "request": one.body, "answer": told} for one, told in answered.scores],
        "stock": answered.stock,
    }
