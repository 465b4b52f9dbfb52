"""The requests that the demo sends to the HTTP API: two orders to score and a product to look up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from app.demo.serving_process import DemoError, send, serving
from lakehouse.iceberg.catalog import Lake
from pipelines.silver.order_items_unified import ORDER_ITEMS_UNIFIED
from pipelines.silver.orders_unified import ORDERS_UNIFIED

NEXT_RING_ORDER = timedelta(minutes=10)
"""Time between the last order of a fraud ring and the next one."""
REQUEST_COLUMNS = ("currency", "payment_method", "card_fingerprint", "ip_address", "device_id", "shipping_address", "store_id")
SHARED_COLUMNS = ("user_id", "card_fingerprint", "ip_address", "device_id")
"""Columns that a fraudulent order has in common with the orders of its victim."""


@dataclass(frozen=True)
class ScoringRequest:
    """An order to be scored, with a title and a description for the reader."""

    title: str
    description: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class LiveAnswers:
    """The requests sent over HTTP and their responses."""

    scores: tuple[tuple[ScoringRequest, Mapping[str, Any]], ...]
    stock: Mapping[str, Any]
    without_model: bool = False
    """No model passed the gate, so no order could be scored."""

    def as_json(self) -> dict[str, Any]:
        """Return requests and responses for JSON output."""
        return {
            "scores": [{"what": one.title, "request": one.body, "answer": response} for one, response in self.scores],
            "stock": self.stock,
        }


def scoring_requests(lake: Lake, fraud: pl.DataFrame) -> tuple[ScoringRequest, ...]:
    """Return the next order of the newest fraud ring and one of a regular customer, as far as the data has them.

    fraud: the ground truth (order_id, kind, ring), which is not part of the lakehouse.
    """
    orders = lake.load(ORDERS_UNIFIED).read(["order_id", "user_id", "channel", "placed_at", "total_amount", *REQUEST_COLUMNS])
    web = orders.filter((pl.col("channel") == "web") & (pl.col("payment_method") == "card")).drop_nulls("user_id")
    web = web.join(fraud, on="order_id", how="left").sort("placed_at", "order_id")
    if web.is_empty():
        return ()
    candidates = (_ring_request(lake, web), _regular_request(lake, web, orders.select(pl.col("placed_at").max()).item()))
    return tuple(request for request in candidates if request is not None)


def _ring_request(lake: Lake, web: pl.DataFrame) -> ScoringRequest | None:
    rings = web.filter(pl.col("kind") == "ring")
    if rings.is_empty():
        return None
    last = rings[-1]
    same_ring = rings.filter(pl.col("ring") == last["ring"][0])
    return ScoringRequest(
        "A fraudulent order",
        f"the next order of a ring with {same_ring.height} earlier orders, from the same account, device, card and address",
        _body("demo-fraud", last, _lines(lake, last), last["placed_at"][0] + NEXT_RING_ORDER),
    )


def _regular_request(lake: Lake, web: pl.DataFrame, placed_at: datetime) -> ScoringRequest | None:
    # a victim shares a device or card with the fraudster and is no example of a regular customer
    fraudulent = web.filter(pl.col("kind").is_not_null())
    unaffected = pl.all_horizontal(~pl.col(name).is_in(fraudulent[name].implode()) for name in SHARED_COLUMNS)
    honest = web.filter(unaffected)
    if honest.is_empty():
        return None
    most_orders = honest.group_by("user_id").agg(pl.len().alias("orders")).sort("orders", "user_id", descending=[True, False])
    own = honest.filter(pl.col("user_id") == most_orders["user_id"][0])
    return ScoringRequest(
        "A legitimate order",
        f"a customer with {own.height} web orders repeats the last one",
        _body("demo-honest", own[-1], _lines(lake, own[-1]), placed_at),
    )


def _lines(lake: Lake, order: pl.DataFrame) -> pl.DataFrame:
    lines = lake.load(ORDER_ITEMS_UNIFIED).read(
        ["order_id", "line_no", "product_id", "quantity", "unit_price"], pl.col("order_id") == order["order_id"][0]
    )
    return lines.filter(pl.col("quantity") > 0).sort("line_no")


def _body(order_id: str, template: pl.DataFrame, lines: pl.DataFrame, placed_at: datetime) -> dict[str, Any]:
    """Return a copy of the order `template` as a checkout would send it."""
    row = template.row(0, named=True)
    return {
        "order_id": order_id,
        "user_id": row["user_id"],
        "total_amount": f"{row['total_amount']:f}",
        "created_at": placed_at.isoformat(),
        "items": [
            {"product_id": product, "quantity": quantity, "unit_price": f"{price:f}"}
            for product, quantity, price in lines.select("product_id", "quantity", "unit_price").iter_rows()
        ],
        **{name: row[name] for name in REQUEST_COLUMNS},
    }


def bestselling_product(lake: Lake) -> str:
    """Return the product with the most order lines. Raises DemoError when there are none."""
    lines = lake.load(ORDER_ITEMS_UNIFIED).read(["order_id", "product_id"]).drop_nulls("product_id")
    if lines.is_empty():
        raise DemoError("There are no order lines, so there is no product to look up. Use more orders: --orders 20000.")
    return str(lines["product_id"].value_counts().sort("count", "product_id", descending=[True, False])["product_id"][0])


def send_requests(home: Path, orders: tuple[ScoringRequest, ...], product: str, *, model: bool) -> LiveAnswers:
    """Start serving, send the requests and stop it. model: whether there is a champion to score with."""
    with serving(home) as address:
        scores = tuple((one, send(f"{address}/v1/fraud/score", one.body)) for one in orders) if model else ()
        stock = send(f"{address}/v1/inventory/{product}")
    return LiveAnswers(scores, stock, not model)
