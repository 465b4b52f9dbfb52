"""Orders in scoring requests, and their conversion to the form of the features.

A data frame per request would be too slow, so a request is converted by look-ups in dictionaries, following silver's rules
(the `transform` of `orders_unified`, `order_items_unified` and `order_entities`). A property test compares the result with
silver's own functions, so that a score matches the features that the lakehouse later computes, as far as it gets the same data.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
import polars as pl
from msgspec import Meta

from ml.tables import order_entities
from pipelines.identity.records import MASTER_PREFIX, USER_PREFIX
from pipelines.parsing.contacts import normalise_email, normalise_phone
from pipelines.settings import BusinessSettings
from serve.http.problems import bad_field
from serve.state.reference_data import ReferenceData

EARLIEST_MOMENT = datetime(1970, 1, 1, tzinfo=UTC)
MAX_CLOCK_SKEW = timedelta(minutes=5)
"""How far the clock of a checkout may be ahead."""
POLARS_WHITESPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Characters that polars strips; Python's own strip removes more."""
RATE_UNITS = 10**8
AMOUNT_LIMIT = 10**20
"""Amounts in ten-thousandths that exceed silver's columns."""

Text = Annotated[str, Meta(max_length=500)]
Amount = Annotated[str, Meta(pattern=r"^-?[0-9]{1,12}(\.[0-9]{1,4})?$")]
"""Money as text, since clients may parse a JSON number as a float. Fits into silver's columns, also when summed."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of an order."""

    product_id: Annotated[str, Meta(max_length=200)] | None
    quantity: Annotated[int, Meta(ge=1, le=1_000_000)]
    unit_price: Annotated[Amount, Meta(description="Price of one unit in the order's currency.")]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order at the checkout: the fields of `orders` and its items."""

    order_id: Annotated[str, Meta(min_length=1, max_length=100, description="The id in `orders`, as text.")]
    currency: Annotated[str, Meta(pattern="^[A-Za-z]{3}$", description="ISO 4217")]
    total_amount: Amount
    items: Annotated[list[Line], Meta(max_length=500)] = []
    source: Annotated[Literal["web", "pos"], Meta(description="Sales channel.")] = "web"
    user_id: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    email: Annotated[Text, Meta(description="Finds the account without a user_id, as do phone and loyalty_id.")] | None = None
    phone: Text | None = None
    loyalty_id: Text | None = None
    account_created_at: (
        Annotated[datetime, Meta(tz=True, description="Opening of an account that the lakehouse may not have yet.")] | None
    ) = None
    store_id: Text | None = None
    payment_method: Text | None = None
    card_fingerprint: Text | None = None
    ip_address: Text | None = None
    device_id: Text | None = None
    shipping_address: Annotated[str, Meta(max_length=2_000)] | None = None
    created_at: Annotated[datetime, Meta(tz=True, description="When the order was placed; default: now.")] | None = None


def order_row(
    order: Order, reference: ReferenceData, context: BusinessSettings, now: datetime, location: str = ""
) -> dict[str, Any]:
    """Return the order in the form of the features (ORDER_COLUMNS).

    location: prefix of field names in problems, such as 'orders[0].'. Raises Problem 409 for impossible moments.
    """
    account = account_of(order, reference, context.default_region)
    placed = _valid_moment(order.created_at or now, now, f"{location}created_at")
    opened: datetime | None = None
    record = person = None
    if account is not None:
        record = f"{USER_PREFIX}{account}"
        # an account that is not in the lakehouse yet is its own person until then
        person = reference.masters.get(record) or MASTER_PREFIX + record
        if order.account_created_at is not None:
            opened = _valid_moment(order.account_created_at, now, f"{location}account_created_at")
        if account in reference.account_opened_at:
            opened = reference.account_opened_at[account]
    return {
        "order_id": order.order_id,
        "placed_at": placed,
        "amount": _amount_in_cents(order, placed.date(), reference, context.base_currency),
        "customer": record,
        "card": _stripped(order.card_fingerprint),
        "device": _stripped(order.device_id),
        "address": _normalised_address(order.shipping_address),
        "ip": _stripped(order.ip_address),
        "person": person,
        "account": account,
        "account_created_at": opened,
        "channel": order.source,
        "payment_method": order.payment_method,
        "category": _main_category(order.items, reference),
        "known_at": None,
        "ratio": None,
    }


def _valid_moment(moment: datetime, now: datetime, field: str) -> datetime:
    """Return the moment in UTC. Raises Problem 409 when it is in the future or before 1970."""
    if moment > now + MAX_CLOCK_SKEW or moment < EARLIEST_MOMENT:
        raise bad_field(field, "is in the future" if moment > now else f"is before {EARLIEST_MOMENT:%Y}", 409)
    return moment.astimezone(UTC)


def account_of(order: Order, reference: ReferenceData, region: str) -> int | None:
    """Return the order's user_id, else the only account that shows one of its identifiers."""
    if order.user_id is not None:
        return order.user_id
    for kind, value in (
        ("loyalty", (order.loyalty_id or "").strip() or None),
        ("email", normalise_email(order.email)),
        ("phone", normalise_phone(order.phone, region)),
    ):
        if value and (account := reference.accounts_by_node.get(f"{kind}:{value}")) is not None:
            return account
    return None


def _amount_in_cents(order: Order, day: date, reference: ReferenceData, base_currency: str) -> int | None:
    """Return the amount in cents of the base currency; None when the rate is unknown."""
    currency, rate = order.currency.strip(POLARS_WHITESPACE).upper(), RATE_UNITS
    if currency != base_currency:
        days, rates = reference.rates.get(currency, ((), ()))
        index = bisect_right(days, day)
        if not index:
            return None
        rate = rates[index - 1]
    total = 100 * _divide_half_even(_ten_thousandths(order.total_amount), 100)  # the source has two decimal places
    base = _divide_half_even(total * rate, RATE_UNITS)
    return _divide_half_even(base, 100) if -AMOUNT_LIMIT < base < AMOUNT_LIMIT else None


def _ten_thousandths(amount: str) -> int:
    """Return an Amount in ten-thousandths."""
    whole, _, fraction = amount.strip().partition(".")
    return int(whole + fraction.ljust(4, "0"))


def _divide_half_even(value: int, divisor: int) -> int:
    """Return value / divisor, rounded half to even. divisor: even."""
    quotient, remainder = divmod(value, divisor)
    half = divisor // 2
    return quotient + (remainder > half or (remainder == half and quotient % 2 == 1))


def _main_category(lines: Sequence[Line], reference: ReferenceData) -> str | None:
    """Return the category with the largest amount; of equal ones the first by name."""
    amounts: dict[str, int] = {}
    for line in lines:
        category = reference.product_categories.get(line.product_id) if line.product_id is not None else None
        if category is not None:
            amount = line.quantity * _ten_thousandths(line.unit_price)
            amounts[category] = amounts.get(category, 0) + (amount if -AMOUNT_LIMIT < amount < AMOUNT_LIMIT else 0)
    return min(amounts, key=lambda category: (-amounts[category], category), default=None)


def _stripped(value: str | None) -> str | None:
    return (value.strip(POLARS_WHITESPACE) or None) if value is not None else None


def _normalised_address(text: str | None) -> str | None:
    if text is None:
        return None
    if text.isascii():
        return re.sub(r"\W+", " ", text.lower(), flags=re.ASCII).strip() or None
    return _normalised_by_polars(text)


@lru_cache(maxsize=8192)
def _normalised_by_polars(text: str) -> str | None:
    """Normalise a non-ASCII address: Python and polars disagree about which characters are letters."""
    normalised: str | None = pl.DataFrame({"shipping_address": [text]}).select(order_entities.ADDRESS).item()
    return normalised
