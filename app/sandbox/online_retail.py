"""Loads real invoices into the sandbox: a Parquet file with the columns of the UCI Online Retail data set.

Every line of the file becomes exactly one order line, including cancellations, adjustments, fees, free and repeated lines.
An order is an invoice, split where its lines are in different months, countries or customers, so that an order's date and
store are those of each of its lines. The country is that of the order's store; each spelling in the file has one online
store. Times are taken as UTC, prices are in GBP.

Stock events follow from the lines: `stock_sold`; `stock_returned` for cancellations (`C...`); `stock_adjusted` for negative
lines that are no cancellation; and one `stock_received` before the first day, enough for all units that leave. Fees and
postage have no stock.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import psycopg
from confluent_kafka import Producer

from app.sandbox.schema import TOPIC
from app.sandbox.servers import Addresses
from lakehouse.errors import SandboxError

CURRENCY = "GBP"
COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "InvoiceNo": pl.String,
    "StockCode": pl.String,
    "Description": pl.String,
    "Quantity": pl.Int64,
    "InvoiceDate": pl.Datetime("us"),
    "UnitPrice": pl.Float64,
    "CustomerID": pl.Float64,
    "Country": pl.String,
}
REQUIRED = ("InvoiceNo", "Quantity", "InvoiceDate", "UnitPrice")
OWN_ID_DIGITS = 15
"""Invoice numbers of up to this many digits are used as order ids; other orders get ids above them."""
EVENTS_AT_ONCE = 50_000

# regions that are no country have user-assigned codes of ISO 3166 (XC, XE, ZZ)
COUNTRY_CODES: dict[str, str] = {
    "Argentina": "AR",
    "Australia": "AU",
    "Austria": "AT",
    "Bahrain": "BH",
    "Belgium": "BE",
    "Brazil": "BR",
    "Bulgaria": "BG",
    "Canada": "CA",
    "Channel Islands": "XC",
    "China": "CN",
    "Croatia": "HR",
    "Cyprus": "CY",
    "Czech Republic": "CZ",
    "Denmark": "DK",
    "EIRE": "IE",
    "Estonia": "EE",
    "European Community": "XE",
    "Finland": "FI",
    "France": "FR",
    "Germany": "DE",
    "Greece": "GR",
    "Hong Kong": "HK",
    "Hungary": "HU",
    "Iceland": "IS",
    "India": "IN",
    "Indonesia": "ID",
    "Israel": "IL",
    "Italy": "IT",
    "Japan": "JP",
    "Korea": "KR",
    "Latvia": "LV",
    "Lebanon": "LB",
    "Lithuania": "LT",
    "Luxembourg": "LU",
    "Malaysia": "MY",
    "Malta": "MT",
    "Mexico": "MX",
    "Netherlands": "NL",
    "New Zealand": "NZ",
    "Nigeria": "NG",
    "Norway": "NO",
    "Philippines": "PH",
    "Poland": "PL",
    "Portugal": "PT",
    "RSA": "ZA",
    "Romania": "RO",
    "Saudi Arabia": "SA",
    "Singapore": "SG",
    "Slovakia": "SK",
    "Slovenia": "SI",
    "Spain": "ES",
    "Sweden": "SE",
    "Switzerland": "CH",
    "Thailand": "TH",
    "Turkey": "TR",
    "USA": "US",
    "United Arab Emirates": "AE",
    "United Kingdom": "GB",
    "Unspecified": "ZZ",
    "Vietnam": "VN",
    "West Indies": "XW",
    "Bermuda": "BM",
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPARE_CODES: tuple[str, ...] = (
    *(f"Q{letter}" for letter in _LETTERS[12:]),
    *(f"X{letter}" for letter in _LETTERS if letter not in "CEW"),
    *(f"{digit}{letter}" for digit in "0123456789" for letter in _LETTERS + "0123456789"),
)
"""For spellings that are not in COUNTRY_CODES: user-assigned codes, then codes that start with a digit."""
FEE = re.compile(r"^(POST|DOT|D|M|m|S|B|C2|CRUK|PADS|BANK CHARGES|AMAZONFEE|gift_.*|TEST.*|ADJUST.*)$")


def check(file: Path) -> None:
    """Raise SandboxError when the file cannot be loaded."""
    try:
        found = pl.read_parquet_schema(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise SandboxError(f"{file} cannot be read as a Parquet file: {' '.join(str(error).split())[:200]}.") from None
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        raise SandboxError(
            f"{file} lacks the columns {', '.join(missing)}; expected are {', '.join(COLUMNS)}. It has {', '.join(found)}."
        )


def country_codes(spellings: list[str]) -> dict[str, str]:
    """Return a unique code of two characters for each spelling; the same spellings always get the same codes."""
    known = {spelling: COUNTRY_CODES[spelling] for spelling in spellings if spelling in COUNTRY_CODES}
    unknown = sorted({spelling for spelling in spellings if spelling not in known})
    spare = [code for code in SPARE_CODES if code not in known.values()]
    if len(unknown) > len(spare):
        raise SandboxError(f"The file contains {len(unknown)} unknown countries, expected at most {len(spare)}.")
    return known | dict(zip(unknown, spare, strict=False))


def read_lines(file: Path) -> pl.DataFrame:
    """Return the lines of the file in their order, with `order_id`, `line_no`, `store_id`, `country`, and `price` in 1/10000.

    Raises SandboxError.
    """
    frame = pl.read_parquet(file, columns=list(COLUMNS))
    if frame.schema["InvoiceDate"] == pl.String:
        frame = frame.with_columns(pl.col("InvoiceDate").str.to_datetime(strict=False))
    try:
        frame = frame.select(pl.col(name).cast(kind) for name, kind in COLUMNS.items()).with_row_index("line")
    except pl.exceptions.PolarsError as error:
        raise SandboxError(f"{file} contains values of an unexpected type: {' '.join(str(error).split())[:200]}.") from None
    incomplete = frame.filter(pl.any_horizontal(pl.col(*REQUIRED).is_null()))
    if incomplete.height:
        raise SandboxError(
            f"{file} has {incomplete.height} lines without {' or '.join(REQUIRED)}, the first is line {incomplete['line'][0]}."
        )
    frame = frame.with_columns(
        price=(pl.col("UnitPrice") * 10_000).round().cast(pl.Int64),
        StockCode=pl.col("StockCode").fill_null("UNKNOWN"),
        Country=pl.col("Country").fill_null("(none)"),
        user_id=pl.col("CustomerID").cast(pl.Int64),
        month=pl.col("InvoiceDate").dt.truncate("1mo"),
    )
    finer = frame.filter(((pl.col("price") / 10_000) - pl.col("UnitPrice")).abs() > 1e-9 * (1 + pl.col("UnitPrice").abs()))
    if finer.height:
        raise SandboxError(f"{file} has {finer.height} prices of more than four decimals, the first in line {finer['line'][0]}.")
    codes = country_codes(frame["Country"].unique().to_list())
    frame = frame.with_columns(country=pl.col("Country").replace_strict(codes, return_dtype=pl.String))
    key = ["InvoiceNo", "Country", "user_id", "month"]
    orders = frame.group_by(key).agg(first=pl.col("line").min()).sort("first")
    # the first order of an invoice gets the invoice number, if it is a number; the others get ids above
    own = pl.col("InvoiceNo").str.contains(rf"^[1-9][0-9]{{0,{OWN_ID_DIGITS - 1}}}$") & (
        pl.int_range(pl.len()).over("InvoiceNo") == 0
    )
    orders = orders.with_columns(own=own).with_columns(
        order_id=pl.when("own")
        .then(pl.col("InvoiceNo").cast(pl.Int64, strict=False))
        .otherwise(10**OWN_ID_DIGITS + (~pl.col("own")).cast(pl.Int64).cum_sum())
    )
    joined = frame.join(orders.select(*key, "order_id"), on=key, how="left", nulls_equal=True).sort("line")
    return joined.with_columns(
        line_no=pl.int_range(1, pl.len() + 1).over("order_id"),
        store_id="online-" + pl.col("country"),
        returned=pl.col("InvoiceNo").str.to_uppercase().str.starts_with("C"),
    )


def load(addresses: Addresses, file: Path, show: Callable[[str, int, int], None] | None = None) -> None:
    """Load the file into the sources. Raises SandboxError."""
    lines = read_lines(file)
    tables = {
        "stores": _stores(lines),
        "products": _products(lines),
        "users": _users(lines),
        "orders": _orders(lines),
        "order_items": _order_items(lines),
    }
    done, total = 0, lines.height * 2
    with psycopg.connect(addresses.postgres_dsn) as connection:
        for table, frame in tables.items():
            copy_frame(connection, table, frame)
            done += frame.height if table == "order_items" else 0
            if show:
                show("lines", done, total)
    _send(addresses, _events(lines), (lambda sent: show("lines", done + sent, total)) if show else None)
    if show:
        show("lines", total, total)


def copy_frame(connection: psycopg.Connection[tuple[object, ...]], table: str, frame: pl.DataFrame) -> None:
    """Append a frame to a table that has columns of the same names."""
    columns = ", ".join(frame.columns)
    with connection.cursor() as cursor, cursor.copy(f"COPY {table} ({columns}) FROM STDIN (FORMAT csv)") as copy:
        for part in frame.iter_slices(100_000):
            text = io.StringIO()
            part.write_csv(text, include_header=False, quote_style="necessary", datetime_format="%Y-%m-%d %H:%M:%S%.6f+00")
            copy.write(text.getvalue())


def _stores(lines: pl.DataFrame) -> pl.DataFrame:
    stores = lines.group_by("store_id", "country", "Country").agg(updated_at=pl.col("InvoiceDate").min()).sort("store_id")
    return stores.select(
        "store_id",
        name="Online " + pl.col("Country"),
        kind=pl.lit("online"),
        city=pl.lit(None, pl.String),
        country="country",
        updated_at="updated_at",
    )


def _products(lines: pl.DataFrame) -> pl.DataFrame:
    """Return each stock code with its most frequent description and its median price."""
    names = (
        lines.filter(pl.col("Description").str.strip_chars() != "")
        .group_by("StockCode", name=pl.col("Description").str.strip_chars())
        .agg(count=pl.len())
        .sort(["StockCode", "count", "name"], descending=[False, True, False])
        .unique("StockCode", keep="first", maintain_order=True)
    )
    products = lines.group_by("StockCode").agg(
        price=pl.col("price").filter(pl.col("price") > 0).median(), updated_at=pl.col("InvoiceDate").min()
    )
    return (
        products.join(names, on="StockCode", how="left")
        .sort("StockCode")
        .select(
            product_id="StockCode",
            name=pl.coalesce("name", "StockCode"),
            category=pl.when(is_fee()).then(pl.lit("Fees")).otherwise(pl.lit("Goods")),
            brand=pl.lit(None, pl.String),
            list_price=_decimal((pl.col("price").fill_null(0) / 100).round().cast(pl.Int64), 2),
            currency=pl.lit(CURRENCY),
            updated_at="updated_at",
        )
    )


def is_fee() -> pl.Expr:
    """Return whether the stock code is a fee, postage, discount or voucher, which has no stock."""
    return pl.col("StockCode").str.contains(FEE.pattern)


def _users(lines: pl.DataFrame) -> pl.DataFrame:
    known = lines.filter(pl.col("user_id").is_not_null())
    places = (
        known.group_by("user_id", "country")
        .agg(count=pl.len())
        .sort(["user_id", "count", "country"], descending=[False, True, False])
        .unique("user_id", keep="first", maintain_order=True)
    )
    times = known.group_by("user_id").agg(created_at=pl.col("InvoiceDate").min())
    return (
        times.join(places, on="user_id", how="left")
        .sort("user_id")
        .select(
            "user_id", "country", "created_at", email_verified=pl.lit("f"), phone_verified=pl.lit("f"), updated_at="created_at"
        )
    )


def _orders(lines: pl.DataFrame) -> pl.DataFrame:
    orders = lines.group_by("order_id").agg(
        pl.col("user_id", "store_id", "returned", "InvoiceNo").first(),
        total=(pl.col("price") * pl.col("Quantity")).sum(),
        created_at=pl.col("InvoiceDate").min(),
    )
    adjusted = pl.col("InvoiceNo").str.to_uppercase().str.starts_with("A") & (pl.col("total") < 0)
    return orders.sort("order_id").select(
        "order_id",
        "user_id",
        "store_id",
        source=pl.lit("web"),
        status=pl.when(pl.col("returned") | adjusted).then(pl.lit("returned")).otherwise(pl.lit("delivered")),
        currency=pl.lit(CURRENCY),
        total_amount=_decimal(pl.col("total"), 4),
        payment_method=pl.lit("invoice"),
        created_at="created_at",
        updated_at="created_at",
    )


def _order_items(lines: pl.DataFrame) -> pl.DataFrame:
    return lines.select(
        "order_id", "line_no", product_id="StockCode", quantity="Quantity", unit_price=_decimal(pl.col("price"), 4)
    )


def _decimal(units: pl.Expr, digits: int) -> pl.Expr:
    """Return an integer number of 10^-digits as decimal text."""
    size = 10**digits
    sign = pl.when(units < 0).then(pl.lit("-")).otherwise(pl.lit(""))
    return pl.format("{}{}.{}", sign, units.abs() // size, (units.abs() % size).cast(pl.String).str.zfill(digits))


def _events(lines: pl.DataFrame) -> pl.DataFrame:
    """Return `key`, `value` and `time` (milliseconds since 1970) of the messages, ordered by time."""
    moved = lines.filter((pl.col("Quantity") != 0) & ~is_fee()).sort("InvoiceDate", "line")
    out = pl.col("Quantity") > 0
    moved = moved.select(
        "store_id",
        "StockCode",
        time="InvoiceDate",
        number=pl.col("line").cast(pl.Int64) + 10**9,
        order_ref="order_id",
        quantity=pl.col("Quantity").abs(),
        change=-pl.col("Quantity") * pl.when(out | pl.col("returned")).then(1).otherwise(-1),
        event_type=pl.when(out)
        .then(pl.lit("stock_sold"))
        .when("returned")
        .then(pl.lit("stock_returned"))
        .otherwise(pl.lit("stock_adjusted")),
    )
    # enough to keep the stock from becoming negative
    lowest = pl.col("change").cum_sum().min()
    opening = moved.group_by("store_id", "StockCode", maintain_order=True).agg(quantity=pl.max_horizontal(-lowest, 0) + 1)
    opening = opening.with_columns(
        time=pl.lit(moved["time"].min()).cast(pl.Datetime("us")).dt.offset_by("-1d"),
        number=pl.int_range(pl.len()).cast(pl.Int64),
        order_ref=pl.lit(None, pl.Int64),
        event_type=pl.lit("stock_received"),
    )
    events = pl.concat([opening, moved.drop("change")], how="diagonal")
    texts = {code: json.dumps(code) for code in events["StockCode"].unique().to_list()}
    order = pl.lit(',"order_ref":"') + pl.col("order_ref").cast(pl.String) + pl.lit('"')
    rest = (
        pl.when(pl.col("event_type") == "stock_received")
        .then(pl.lit(',"reason":"opening"'))
        .when(pl.col("event_type") == "stock_adjusted")
        .then(pl.lit(',"sign":-1,"reason":"correction"') + order)
        .otherwise(order)
    )
    milliseconds = pl.col("time").dt.epoch("ms")
    return events.select(
        key=pl.format("{}|{}", "store_id", "StockCode"),
        value=pl.concat_str(
            pl.lit('{"event_id":"R'),
            milliseconds.cast(pl.String).str.zfill(14),
            pl.lit("-"),
            pl.col("number").cast(pl.String).str.zfill(10),
            pl.lit('","event_type":"'),
            pl.col("event_type"),
            pl.lit('","timestamp":"'),
            pl.col("time").dt.strftime("%Y-%m-%dT%H:%M:%S.%3fZ"),
            pl.lit('","channel":"web","metadata":{"store_id":"'),
            pl.col("store_id"),
            pl.lit('","product_id":'),
            pl.col("StockCode").replace_strict(texts, return_dtype=pl.String),
            pl.lit(',"quantity":'),
            pl.col("quantity").cast(pl.String),
            rest,
            pl.lit("}}"),
        ),
        time=milliseconds,
    )


def _send(addresses: Addresses, events: pl.DataFrame, on_sent: Callable[[int], None] | None) -> None:
    producer = Producer(
        {
            "bootstrap.servers": addresses.kafka_bootstrap,
            "enable.idempotence": True,
            "log_level": 0,
            "compression.type": "lz4",
            "linger.ms": 100,
            "batch.num.messages": 20_000,
            "batch.size": 1 << 20,
            "queue.buffering.max.messages": 500_000,
            "message.timeout.ms": 60_000,
        }
    )
    failures: list[str] = []

    def delivered(error: object, _message: object) -> None:
        if error is not None:
            failures.append(str(error))

    sent = 0
    for part in events.iter_slices(EVENTS_AT_ONCE):
        for key, value, time in part.iter_rows():
            while True:
                try:
                    producer.produce(TOPIC, value, key, timestamp=time, on_delivery=delivered)
                    break
                except BufferError:
                    producer.poll(0.1)
        sent += part.height
        producer.poll(0)
        if on_sent:
            on_sent(sent)
    if producer.flush(120) or failures:
        reason = (failures or ["timeout"])[0]
        raise SandboxError(f"The sandbox's broker did not accept all events ({reason}). See kafka.log in the sandbox directory.")
