"""One marketplace document (canonical Extended JSON) as an order and its items.

Only `_id`, `mp_order_id`, `platform` and `order_time` are required. An absent or null field is null. A field that is present but
cannot be read makes the document unreadable, with a reason that has the field and the type found, never the value.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from pipelines.parsing.amounts import AmountUnreadable, amount_of_digits, marked_currency, parse_amount
from pipelines.parsing.extended_json import (
    DocumentUnreadable,
    instant,
    number_text,
    plain_json,
    text_value,
    type_name,
    wrapper_of,
)

PLATFORM_CURRENCY = {
    "tokopedia": "IDR",
    "bukalapak": "IDR",
    "blibli": "IDR",
    "rakuten": "JPY",
    "mercari": "JPY",
    "coupang": "KRW",
}
"""Currency of a document without `currency`, for platforms that sell in a single one."""

_SMALL_INTEGER = re.compile(r"-?[0-9]{1,9}")

ItemValues = tuple[int, str | None, str | None, int, Decimal | None, str | None]
"""Line number, product id, product name, quantity, unit price, variant."""

OrderValues = tuple[tuple[Any, ...], tuple[ItemValues, ...]]
"""Values in the order of ORDER_FIELDS (times in microseconds), and the items. Plain tuples of plain values: the garbage
collector soon stops tracking them, which halves the time to parse many documents."""

ORDER_FIELDS = (
    "platform", "mp_order_id", "status", "currency", "total_amount", "payment_method", "card_fingerprint", "ip_address",
    "device_id", "loyalty_id", "email_raw", "phone_raw", "buyer_name", "shipping_address", "placed_at", "updated_at",
)  # fmt: skip


def read_document(text: str) -> OrderValues:
    """Return the values of one document. Raises DocumentUnreadable."""
    try:
        document = json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError):
        raise DocumentUnreadable("document is no JSON, expected an Extended JSON object") from None
    if not isinstance(document, dict):
        raise DocumentUnreadable(f"document is {type_name(document)}, expected an object")
    platform, mp_order_id = _required_text(document, "platform"), _required_text(document, "mp_order_id")
    placed_at = instant(document.get("order_time"), "order_time")
    if placed_at is None:
        raise DocumentUnreadable("order_time is null or absent, expected a date")
    updated_at = instant(document.get("updated_at"), "updated_at")
    total, currency = _total_and_currency(document, platform)
    status = _text(document, "status")
    return (
        (
            platform,
            mp_order_id,
            _normalised_status(status),
            currency,
            total,
            _text(document, "payment_method"),
            _text(document, "card_fingerprint"),
            _text(document, "ip_address"),
            _text(document, "device_id"),
            _text(document, "loyalty_id"),
            _text(document, "user_email"),
            _text(document, "buyer_phone"),
            _text(document, "buyer_name", joined_by=" "),
            _text(document, "shipping_address", joined_by=", "),
            placed_at,
            placed_at if updated_at is None else updated_at,
        ),
        _items(document, total, currency),
    )


def _text(source: dict[str, Any], key: str, where: str = "", joined_by: str = "") -> str | None:
    """Return a text field; `where` is the path of `source` within the document."""
    return text_value(source.get(key), f"{where}.{key}" if where else key, joined_by=joined_by)


def _required_text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value:
        found = "empty" if value == "" else type_name(value)
        raise DocumentUnreadable(f"{key} is {found}, expected text")
    return value


def _normalised_status(status: str | None) -> str | None:
    """Return the status in lower case and British spelling."""
    name = status.lower() if status else None
    return "cancelled" if name == "canceled" else name


def _total_and_currency(document: dict[str, Any], platform: str) -> tuple[Decimal | None, str | None]:
    currency = _text(document, "currency")
    amount = document.get("amount")
    if currency is not None:
        currency = currency.upper()
        if len(currency) != 3 or not (currency.isascii() and currency.isalpha()):
            raise DocumentUnreadable("currency is other text, expected an ISO 4217 code of three letters")
    elif isinstance(amount, str):
        currency = marked_currency(amount)
    if currency is None:
        currency = PLATFORM_CURRENCY.get(platform.strip().lower())
    return _amount(amount, currency, "amount"), currency


def _items(document: dict[str, Any], total: Decimal | None, currency: str | None) -> tuple[ItemValues, ...]:
    """Return the items. A document without `items` has one, described by the order's own fields, if it names a product."""
    items = document.get("items")
    if items is not None and not isinstance(items, list):
        raise DocumentUnreadable(f"items is {type_name(items)}, expected an array")
    if not items:
        product_name = _text(document, "product_name")
        if product_name is None:
            return ()
        return ((1, _text(document, "product_id"), product_name, 1, total, plain_json(document.get("variant"))),)
    only_total = total if len(items) == 1 else None
    return tuple(_item(item, line_no, only_total, currency) for line_no, item in enumerate(items, 1))


def _item(item: Any, line_no: int, only_total: Decimal | None, currency: str | None) -> ItemValues:
    """Return one item. only_total: the order's total when this is its only item, the price of a single piece without one."""
    where = f"items[{line_no - 1}]"
    if not isinstance(item, dict) or wrapper_of(item):
        raise DocumentUnreadable(f"{where} is {type_name(item)}, expected an object")
    quantity = _quantity(item.get("quantity"), f"{where}.quantity")
    price = _amount(item.get("price"), currency, f"{where}.price")
    return (
        line_no,
        _text(item, "product_id", where),
        _text(item, "product_name", where),
        quantity,
        only_total if price is None and quantity == 1 else price,
        plain_json(item.get("variant")),
    )


def _amount(value: Any, currency: str | None, field: str) -> Decimal | None:
    if value is None:
        return None
    digits = number_text(value)
    try:
        if digits is not None:
            return amount_of_digits(digits)
        if isinstance(value, str):
            return parse_amount(value, currency)
    except AmountUnreadable as error:
        raise DocumentUnreadable(f"{field} is {type_name(value)} and {error}") from None
    raise DocumentUnreadable(f"{field} is {type_name(value)}, expected a number or its spelling")


def _quantity(value: Any, field: str) -> int:
    """Return a whole number of 32 bits; 1 when it is absent."""
    if value is None:
        return 1
    digits = value.strip() if isinstance(value, str) else number_text(value)
    if digits is not None and _SMALL_INTEGER.fullmatch(digits):
        return int(digits)
    try:
        number = amount_of_digits(digits or "")
        if abs(number) < 2**31 and number == number.to_integral_value():
            return int(number)
    except AmountUnreadable:
        pass
    raise DocumentUnreadable(f"{field} is {type_name(value)}, expected a whole number of 32 bits")
