"""Amounts of money: parsing of any spelling to a Decimal, and conversion to the base currency with a single rounding.

Rules for ambiguous spellings
    A sign that occurs twice separates groups ('1.234.567'). If '.' and ',' both occur, the last is the decimal sign
    ('1.234,56', '350,000.00'). A space or apostrophe always separates groups ('1 234,56', "1'234.50").
    A single '.' or ',' before exactly three digits ('350.000', '1,234') separates groups, because few currencies have three
    decimals; in those (KWD, BHD, OMR, JOD, TND, IQD, LYD) it is the decimal sign. If it cannot separate groups ('0.500',
    '1234.567') or follows grouped digits ('1 234,567'), it is the decimal sign too.
    Before any other number of digits it is the decimal sign ('12,5', '350000.0').
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
MAX_AMOUNT = 10**13
"""Magnitude from which on an amount of one order or line is taken for an error. Sums of smaller ones fit into AMOUNT."""
_RATE_SCALE = 8
_QUANTUM = Decimal(1).scaleb(-SCALE)
_EXACT_CONTEXT = Context(prec=60)
_LIMIT = Decimal(10) ** (20 - SCALE)
_THREE_DECIMALS = frozenset({"KWD", "BHD", "OMR", "JOD", "TND", "IQD", "LYD"})

CURRENCY_MARKS: dict[str, frozenset[str]] = {
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
"""Marks before or after an amount, and the currencies they can mean (empty: too many to list)."""

_MARKED = re.compile(
    r"(?P<before>[^\d.,'\s]+\.?|)\s*(?P<number>[\d.,' ]*\d[\d.,' ]*(?:[eE][+-]?\d+)?)\s*(?P<after>[^\d.,'\s]+\.?|)"
)
_PLAIN = re.compile(r"\d{1,15}(?:\.\d{1,2})?")
_SCIENTIFIC = re.compile(r"\d+(?:\.\d+)?[eE][+-]?\d+")
_EMPTY_DECIMALS = re.compile(r"[.,](?:-{1,2}|=)$")
_SIGN_VARIANTS = str.maketrans({"’": "'", "٬": "'", "٫": ".", "−": "-", "–": "-"})
_SPACES = re.compile(r"\s+")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+|\d{1,3}(?:,\d{2})*,\d{3}")


class AmountUnreadable(ValueError):
    """A text that is not an amount, or is ambiguous. The message contains none of its digits."""


@lru_cache(maxsize=65_536)
def parse_amount(text: str, currency: str | None = None) -> Decimal:
    """Return the amount of a text, rounded half-even to 4 places. Raises AmountUnreadable.

    currency: ISO 4217 code, for the rule of three digits (see the module) and to detect a contradicting mark ('Rp' in USD).
    """
    if _PLAIN.fullmatch(text):
        return Decimal(text).quantize(_QUANTUM)
    return _parse_marked(text, currency)[0]


def marked_currency(text: str) -> str | None:
    """Return the currency of an amount's mark if it is unambiguous: 'Rp 350.000' -> 'IDR'; '$5' -> None."""
    try:
        meant = _parse_marked(text, None)[1]
    except AmountUnreadable:
        return None
    return next(iter(meant)) if len(meant) == 1 else None


@lru_cache(maxsize=65_536)
def amount_of_digits(digits: str) -> Decimal:
    """Return `exact_amount` of a number in machine-readable form ('350000', '1.5e3'). Raises AmountUnreadable."""
    try:
        return exact_amount(Decimal(digits))
    except ArithmeticError:
        raise AmountUnreadable("is not a number") from None


def exact_amount(number: Decimal) -> Decimal:
    """Return a number rounded half-even to 4 places. Raises AmountUnreadable if it does not fit into AMOUNT."""
    if not number.is_finite():
        raise AmountUnreadable("is not a finite number")
    if abs(number) >= _LIMIT:
        raise AmountUnreadable(f"has more than {20 - SCALE} digits before the decimal sign")
    result = number.quantize(_QUANTUM, rounding=ROUND_HALF_EVEN, context=_EXACT_CONTEXT)
    if abs(result) >= _LIMIT:
        raise AmountUnreadable(f"has more than {20 - SCALE} digits before the decimal sign")
    return abs(result) if result.is_zero() else result


def _parse_marked(text: str, currency: str | None) -> tuple[Decimal, frozenset[str]]:
    """Return the amount of a text, and the currencies that its mark can mean."""
    body = unicodedata.normalize("NFKC", text).translate(_SIGN_VARIANTS)
    body = _SPACES.sub(" ", body).strip()
    negative = False
    if body.startswith("(") and body.endswith(")"):
        negative, body = True, body[1:-1].strip()
    body = _EMPTY_DECIMALS.sub("", body)
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
    meant = _currencies_of_mark(before or after)
    if currency and meant and currency not in meant:
        raise AmountUnreadable(f"has the mark of {'/'.join(sorted(meant))}, but the currency is {currency}")
    if len(meant) == 1:
        currency = next(iter(meant))
    number = exact_amount(_number(found["number"].strip(), currency))
    return (-number if (negative or minus_signs) and not number.is_zero() else number), meant


def _minus_is_outside(text: str) -> bool:
    """Return whether there is no minus sign between two digits."""
    return re.search(r"\d\s*[-−–]\s*\d", text) is None


def _currencies_of_mark(mark: str) -> frozenset[str]:
    if not mark:
        return frozenset()
    if mark in CURRENCY_MARKS:
        return CURRENCY_MARKS[mark]
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
    """Return the digits before and after the decimal sign."""
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
    """Return the digits of a whole number whose groups are separated by one kind of sign."""
    if text.isdigit() or not text:
        return text
    separators = {letter for letter in text if not letter.isdigit()}
    if len(separators) != 1 or not _GROUPED.fullmatch(re.sub(r"[^\d]", ",", text)):
        raise AmountUnreadable("has digits grouped in no known way")
    return re.sub(r"[^\d]", "", text)


def line_amounts(quantity: pl.Series, unit_price: pl.Series) -> pl.Series:
    """Return quantity x unit_price, exact, as Decimal(20, 4); null if it does not fit."""
    product = quantity.cast(pl.Int128) * _units(unit_price, SCALE)
    return _decimals(_null_if_too_large(product), 20, SCALE)


def to_base_currency(amount: pl.Series, rate: pl.Series) -> pl.Series:
    """Return amount x rate, rounded half-even to 4 places, as Decimal(20, 4); null if it does not fit.

    amount: Decimal(20, 4), rate: Decimal(18, 8). The product is exact in 128 bits and rounded once.
    """
    product = _units(amount, SCALE) * _units(rate, _RATE_SCALE)
    return _decimals(_null_if_too_large(_divided_half_even(product, 10**_RATE_SCALE)), 20, SCALE)


def _divided_half_even(units: pl.Series, divisor: int) -> pl.Series:
    """Return integers divided by an even number, rounded half-even."""
    by, half = pl.lit(divisor, dtype=pl.Int128), pl.lit(divisor // 2, dtype=pl.Int128)
    one, two = pl.lit(1, dtype=pl.Int128), pl.lit(2, dtype=pl.Int128)
    value = pl.col("units")
    # floor division: the remainder is never negative, whatever the sign
    floor, rest = value // by, value % by
    up = (rest > half) | ((rest == half) & (floor % two == one))
    return units.alias("units").to_frame().select(floor + up.cast(pl.Int128)).to_series()


def _null_if_too_large(units: pl.Series) -> pl.Series:
    """Return the numbers with null in place of those with more than 20 digits."""
    value, limit = pl.col("units"), pl.lit(10**20, dtype=pl.Int128)
    fits = (value < limit) & (value > -limit)
    return units.alias("units").to_frame().select(pl.when(fits).then(value)).to_series()


def _units(values: pl.Series, scale: int) -> pl.Series:
    """Return a Decimal column as Int128 units of 10^-scale."""
    return values.cast(pl.Decimal(38, scale)).to_physical()


def _decimals(units: pl.Series, precision: int, scale: int) -> pl.Series:
    """Return Int128 units of 10^-scale as a Decimal column. The bytes are reinterpreted, so nothing is rounded."""
    whole = units.cast(pl.Decimal(38, 0)).rechunk().to_arrow()
    retyped = pa.Array.from_buffers(pa.decimal128(precision, scale), len(whole), whole.buffers(), whole.null_count, whole.offset)
    return pl.Series(units.name, retyped, dtype=pl.Decimal(precision, scale))
