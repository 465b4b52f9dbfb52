"""Amounts of money: any spelling to a Decimal, and to the base currency without a rounding too many.

How an ambiguous spelling is read
    A sign that comes twice separates groups ('1.234.567'). Of '.' and ',' together the last is the decimal sign
    ('1.234,56', '350,000.00'). A space or apostrophe always separates groups ('1 234,56', "1'234.50").
    A single '.' or ',' followed by exactly three digits ('350.000', '1,234') separates groups, because no currency
    but a few has three decimals; in those few (KWD, BHD, OMR, JOD, TND, IQD, LYD) it is the decimal sign. Where it
    cannot separate groups ('0.500', '1234.567') or follows grouped digits ('1 234,567') it is the decimal sign too.
    Followed by any other number of digits it is the decimal sign ('12,5', '350000.0').
"""

from __future__ import annotations

import re
import unicodedata
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from functools import lru_cache

import polars as pl
import pyarrow as pa

SCALE = 4
AMOUNT = pl.Decimal(20, SCALE)
"""Type of an amount of money."""
_RATE_SCALE = 8
_QUANTUM = Decimal(1).scaleb(-SCALE)
_ROOMY = Context(prec=60)
_LIMIT = Decimal(10) ** (20 - SCALE)
_THREE_DECIMALS = frozenset({"KWD", "BHD", "OMR", "JOD", "TND", "IQD", "LYD"})

MARKS: dict[str, frozenset[str]] = {
    "rp": frozenset({"IDR"}),
    "rp.": frozenset({"IDR"}),
    "rm": frozenset({"MYR"}),
    "rs": frozenset({"INR", "PKR", "LKR", "NPR"}),
    "rs.": frozenset({"INR", "PKR", "LKR", "NPR"}),
    "¥": frozenset({"JPY", "CNY"}),
    "円": frozenset({"JPY"}),
    "元": frozenset({"CNY"}),
    "€": frozenset({"EUR"}),
    "£": frozenset({"GBP", "EGP", "LBP", "SYP"}),
    "₩": frozenset({"KRW"}),
    "원": frozenset({"KRW"}),
    "₹": frozenset({"INR"}),
    "฿": frozenset({"THB"}),
    "₫": frozenset({"VND"}),
    "đ": frozenset({"VND"}),
    "₱": frozenset({"PHP"}),
    "₺": frozenset({"TRY"}),
    "₽": frozenset({"RUB"}),
    "zł": frozenset({"PLN"}),
    "kr": frozenset({"SEK", "NOK", "DKK", "ISK"}),
    "kr.": frozenset({"SEK", "NOK", "DKK", "ISK"}),
    "r$": frozenset({"BRL"}),
    "us$": frozenset({"USD"}),
    "s$": frozenset({"SGD"}),
    "a$": frozenset({"AUD"}),
    "hk$": frozenset({"HKD"}),
    "nt$": frozenset({"TWD"}),
    "$": frozenset(),
}
"""What may stand before or after an amount, and the currencies it can mean (none named: many)."""

_MARKED = re.compile(
    r"(?P<before>[^\d.,'\s]+\.?|)\s*(?P<number>[\d.,' ]*\d[\d.,' ]*(?:[eE][+-]?\d+)?)\s*(?P<after>[^\d.,'\s]+\.?|)"
)
_PLAIN = re.compile(r"\d{1,15}(?:\.\d{1,2})?")
_SCIENTIFIC = re.compile(r"\d+(?:\.\d+)?[eE][+-]?\d+")
_NO_MINOR = re.compile(r"[.,](?:-{1,2}|=)$")
_ONE_SIGN = str.maketrans({"’": "'", "٬": "'", "٫": ".", "−": "-", "–": "-"})
_SPACES = re.compile(r"\s+")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+|\d{1,3}(?:,\d{2})*,\d{3}")


class AmountUnreadable(ValueError):
    """A spelling that is no amount, or could be two; the message holds no digit of it."""


@lru_cache(maxsize=65_536)
def parse_amount(text: str, currency: str | None = None) -> Decimal:
    """The amount that `text` spells, rounded half-even to 4 places. Raises AmountUnreadable.

    currency: ISO 4217, for the rule of three digits (see the module) and to find a contradicting mark ('Rp' in USD).
    """
    if _PLAIN.fullmatch(text):
        return Decimal(text).quantize(_QUANTUM)
    return _parse_marked(text, currency)[0]


def marked_currency(text: str) -> str | None:
    """The currency that an amount's own mark names without doubt: 'Rp 350.000' -> 'IDR'; '$5' -> None."""
    try:
        meant = _parse_marked(text, None)[1]
    except AmountUnreadable:
        return None
    return next(iter(meant)) if len(meant) == 1 else None


@lru_cache(maxsize=65_536)
def amount_of_digits(digits: str) -> Decimal:
    """`exact_amount` of a number as programs write it ('350000', '1.5e3'). Raises AmountUnreadable."""
    try:
        return exact_amount(Decimal(digits))
    except ArithmeticError:
        raise AmountUnreadable("is not a number") from None


def exact_amount(number: Decimal) -> Decimal:
    """A number rounded half-even to the 4 places that tables hold. Raises AmountUnreadable when it does not fit."""
    if not number.is_finite():
        raise AmountUnreadable("is not a finite number")
    if abs(number) >= _LIMIT:
        raise AmountUnreadable(f"has more than {20 - SCALE} digits before the decimal sign")
    result = number.quantize(_QUANTUM, rounding=ROUND_HALF_EVEN, context=_ROOMY)
    if abs(result) >= _LIMIT:
        raise AmountUnreadable(f"has more than {20 - SCALE} digits before the decimal sign")
    return abs(result) if result.is_zero() else result


def _parse_marked(text: str, currency: str | None) -> tuple[Decimal, frozenset[str]]:
    body = unicodedata.normalize("NFKC", text).translate(_ONE_SIGN)
    body = _SPACES.sub(" ", body).strip()
    negative = False
    if body.startswith("(") and body.endswith(")"):
        negative, body = True, body[1:-1].strip()
    body = _NO_MINOR.sub("", body)
    body, minus_signs = body.replace("-", ""), body.count("-")
    if minus_signs > 1 or (minus_signs and negative) or not _minus_is_outside(text):
        raise AmountUnreadable("has a sign in the middle or more than one")
    body = body.strip().removeprefix("+").strip()
    found = _MARKED.fullmatch(body)
    if found is None:
        raise AmountUnreadable("is not an amount")
    before, after = found["before"].lower(), found["after"].lower()
    if before and after and before != after:
        raise AmountUnreadable("has two currency marks")
    meant = _meaning(before or after)
    if currency and meant and currency not in meant:
        raise AmountUnreadable(f"has the mark of {'/'.join(sorted(meant))}, but the currency is {currency}")
    if len(meant) == 1:
        currency = next(iter(meant))
    number = exact_amount(_number(found["number"].strip(), currency))
    return (-number if (negative or minus_signs) and not number.is_zero() else number), meant


def _minus_is_outside(text: str) -> bool:
    """Whether no minus sign stands between two digits."""
    return re.search(r"\d\s*[-−–]\s*\d", text) is None


def _meaning(mark: str) -> frozenset[str]:
    if not mark:
        return frozenset()
    if mark in MARKS:
        return MARKS[mark]
    if re.fullmatch(r"[a-z]{3}", mark):
        return frozenset({mark.upper()})
    raise AmountUnreadable("has text around it that is no currency mark")


def _number(text: str, currency: str | None) -> Decimal:
    if _SCIENTIFIC.fullmatch(text):
        try:
            return Decimal(text)
        except InvalidOperation:
            raise AmountUnreadable("has an exponent out of range") from None
    if re.search(r"[eE]", text):
        raise AmountUnreadable("is not an amount")
    whole, decimals = _split(text, currency)
    return Decimal(f"{whole or '0'}.{decimals or '0'}")


def _split(text: str, currency: str | None) -> tuple[str, str]:
    """The digits before and after the decimal sign."""
    last = max(text.rfind("."), text.rfind(","))
    if last < 0:
        return _ungrouped(text), ""
    sign = text[last]
    other = "," if sign == "." else "."
    head, tail = text[:last], text[last + 1 :]
    if tail and not tail.isdigit():
        if other in text or text.count(sign) > 1 or not re.fullmatch(r"\d{1,3}", head):
            raise AmountUnreadable("mixes its separators")
        return _ungrouped(text), ""
    if text.count(sign) > 1:
        return _ungrouped(text), ""
    if other in head or " " in head or "'" in head:
        return _ungrouped(head), tail
    if len(tail) == 3 and re.fullmatch(r"[1-9]\d{0,2}", head) and currency not in _THREE_DECIMALS:
        return head + tail, ""
    return _ungrouped(head), tail


def _ungrouped(text: str) -> str:
    """The digits of a whole number whose groups are separated by one kind of sign."""
    if text.isdigit() or not text:
        return text
    separators = {letter for letter in text if not letter.isdigit()}
    if len(separators) != 1 or not _GROUPED.fullmatch(re.sub(r"[^\d]", ",", text)):
        raise AmountUnreadable("has digits grouped in no known way")
    return re.sub(r"[^\d]", "", text)


def line_amounts(quantity: pl.Series, unit_price: pl.Series) -> pl.Series:
    """quantity x unit_price, exact, as Decimal(20, 4); null where it would not fit."""
    product = quantity.cast(pl.Int128) * _units(unit_price, SCALE)
    return _decimals(_that_fit(product), 20, SCALE)


def to_base_currency(amount: pl.Series, rate: pl.Series) -> pl.Series:
    """amount x rate in the base currency, rounded half-even to 4 places, as Decimal(20, 4); null where it would not fit.

    amount: Decimal(20, 4), rate: Decimal(18, 8). The product of the two is held exactly in 128 bits and rounded once.
    """
    product = _units(amount, SCALE) * _units(rate, _RATE_SCALE)
    return _decimals(_that_fit(_divided_half_even(product, 10**_RATE_SCALE)), 20, SCALE)


def _divided_half_even(units: pl.Series, divisor: int) -> pl.Series:
    """Integers divided by an even number, halves to the even neighbour."""
    by, half = pl.lit(divisor, dtype=pl.Int128), pl.lit(divisor // 2, dtype=pl.Int128)
    one, two = pl.lit(1, dtype=pl.Int128), pl.lit(2, dtype=pl.Int128)
    value = pl.col("units")
    # floor division: the remainder is never negative, whatever the sign
    floor, rest = value // by, value % by
    up = (rest > half) | ((rest == half) & (floor % two == one))
    return units.alias("units").to_frame().select(floor + up.cast(pl.Int128)).to_series()


def _that_fit(units: pl.Series) -> pl.Series:
    """Null where a number has more than 20 digits."""
    value, limit = pl.col("units"), pl.lit(10**20, dtype=pl.Int128)
    fits = (value < limit) & (value > -limit)
    return units.alias("units").to_frame().select(pl.when(fits).then(value)).to_series()


def _units(values: pl.Series, scale: int) -> pl.Series:
    """A Decimal column as Int128 units of 10^-scale."""
    return values.cast(pl.Decimal(38, scale)).to_physical()


def _decimals(units: pl.Series, precision: int, scale: int) -> pl.Series:
    """Int128 units of 10^-scale as a Decimal column: the same bytes under another type, so nothing is rounded."""
    whole = units.cast(pl.Decimal(38, 0)).rechunk().to_arrow()
    retyped = pa.Array.from_buffers(pa.decimal128(precision, scale), len(whole), whole.buffers(), whole.null_count, whole.offset)
    return pl.Series(units.name, retyped, dtype=pl.Decimal(precision, scale))
