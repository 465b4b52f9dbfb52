"""Amounts: parsing of any spelling to a Decimal, and conversion with a single rounding."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.parsing.amounts import (
    AmountUnreadable,
    amount_of_digits,
    line_amounts,
    marked_currency,
    parse_amount,
    to_base_currency,
)


@pytest.mark.parametrize(
    ("text", "currency", "expected"),
    [
        ("350000", "IDR", "350000"),
        ("350.000", "IDR", "350000"),
        ("Rp 350.000", "IDR", "350000"),
        ("Rp350.000,-", "IDR", "350000"),
        ("Rp. 350.000,00", None, "350000"),
        ("IDR 350.000", "IDR", "350000"),
        ("350.000 IDR", "IDR", "350000"),
        ("350,000.00", "IDR", "350000"),
        ("350000.0", "IDR", "350000"),
        ("3.5E5", "IDR", "350000"),
        ("1.234,56", "EUR", "1234.56"),
        ("1 234,56", "EUR", "1234.56"),
        ("1\u202f234,56 €", "EUR", "1234.56"),
        ("1 234,567", "EUR", "1234.567"),
        ("€ 1.000.000,00", "EUR", "1000000"),
        ("1'234.50", "CHF", "1234.50"),
        ("¥1200", "JPY", "1200"),
        ("￥１，２００", "JPY", "1200"),
        ("1,23,456.00", "INR", "123456"),
        ("$1,234", "USD", "1234"),
        ("350.000", "USD", "350000"),
        ("0.500", "USD", "0.5"),
        ("1234.567", "USD", "1234.567"),
        ("1.234", "KWD", "1.234"),
        (".5", "USD", "0.5"),
        ("5.", "USD", "5"),
        ("-12", "USD", "-12"),
        ("−Rp 5.000", "IDR", "-5000"),
        ("5.000-", "IDR", "-5000"),
        ("(1,234.50)", "USD", "-1234.5"),
        ("-0.00", "USD", "0"),
        ("+5", "USD", "5"),
        ("kr. 1.234,50", "DKK", "1234.5"),
        ("0.12345", "USD", "0.1234"),
        ("0.12355", "USD", "0.1236"),
    ],
)
def test_spellings(text: str, currency: str | None, expected: str) -> None:
    assert parse_amount(text, currency) == Decimal(expected)


@pytest.mark.parametrize(
    ("text", "currency", "reason"),
    [
        ("", "USD", "not an amount"),
        ("free", "USD", "not an amount"),
        ("350rb", "IDR", "no currency mark"),
        ("1.2.3", "USD", "grouped in no known way"),
        ("1,234.567,8", "USD", "grouped in no known way"),
        ("12 34", "USD", "grouped in no known way"),
        ("1-2", "USD", "sign in the middle"),
        ("-(5)", "USD", "two currency marks"),
        ("(-5)", "USD", "more than one"),
        ("Rp 5", "USD", "mark of IDR, but the currency is USD"),
        ("USD 5 IDR", "USD", "two currency marks"),
        ("99999999999999999", "USD", "more than 16 digits"),
        ("1e400", "USD", "more than 16 digits"),
    ],
)
def test_unreadable_amount_has_a_reason_without_the_value(text: str, currency: str, reason: str) -> None:
    with pytest.raises(AmountUnreadable, match=reason):
        parse_amount(text, currency)


@pytest.mark.parametrize(
    ("digits", "expected"), [("350000.0", "350000"), ("1E+3", "1000"), ("0.30000000000000004", "0.3"), ("-7", "-7")]
)
def test_machine_readable_numbers(digits: str, expected: str) -> None:
    assert amount_of_digits(digits) == Decimal(expected)


@pytest.mark.parametrize("digits", ["NaN", "Infinity", "-Infinity", "x", "1E+20", "9999999999999999.99999"])
def test_numbers_that_are_not_amounts(digits: str) -> None:
    with pytest.raises(AmountUnreadable):
        amount_of_digits(digits)


def test_only_unambiguous_marks_determine_the_currency() -> None:
    assert [marked_currency(text) for text in ("Rp 350.000", "12 EUR", "$5", "¥5", "5", "?")] == [
        "IDR",
        "EUR",
        None,
        None,
        None,
        None,
    ]


GROUPS_AND_DECIMALS = [
    (".", ","),
    (",", "."),
    (" ", ","),
    (" ", "."),
    ("'", "."),
    ("\u00a0", ","),
    ("\u202f", ","),
    ("", "."),
    ("", ","),
]
SIGNS = ["{}", "-{}", "({})", "{}-"]
MARKS = {"EUR": ["{}", "€{}", "€ {}", "{} €", "EUR {}", "{}EUR"], "IDR": ["{}", "Rp {}", "Rp{}", "Rp. {}", "{} IDR", "idr {}"]}


@settings(deadline=None)
@given(
    units=st.integers(0, 10**12),
    locale=st.sampled_from(GROUPS_AND_DECIMALS),
    sign=st.sampled_from(SIGNS),
    currency=st.sampled_from(sorted(MARKS)),
    data=st.data(),
)
def test_amount_round_trips_in_every_locale(
    units: int, locale: tuple[str, str], sign: str, currency: str, data: st.DataObject
) -> None:
    group, point = locale
    whole, hundredths = divmod(units, 100)
    body = f"{whole:,}".replace(",", group) + f"{point}{hundredths:02d}"
    text = sign.format(data.draw(st.sampled_from(MARKS[currency])).format(body))
    expected = Decimal(units).scaleb(-2) * (1 if sign == "{}" else -1)
    assert parse_amount(text, currency) == expected


@settings(deadline=None)
@given(whole=st.integers(0, 10**12), group=st.sampled_from([".", ",", " ", "'"]))
def test_grouped_whole_amount_round_trips(whole: int, group: str) -> None:
    assert parse_amount(f"{whole:,}".replace(",", group), "IDR") == whole


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e11, max_value=1e11))
def test_double_is_parsed_from_its_shortest_form(number: float) -> None:
    assert amount_of_digits(repr(number)) == Decimal(repr(number)).quantize(Decimal("0.0001"), ROUND_HALF_EVEN)


@settings(deadline=None)
@given(st.text(max_size=12) | st.text("0123456789.,' -()Rp$€eE+", max_size=12), st.sampled_from([None, "IDR", "USD", "KWD"]))
def test_any_text_is_an_amount_or_an_error(text: str, currency: str | None) -> None:
    try:
        amount = parse_amount(text, currency)
    except AmountUnreadable:
        return
    assert amount.as_tuple().exponent == -4
    assert parse_amount(str(amount), currency) == amount


AMOUNT = st.integers(-(10**20) + 1, 10**20 - 1).map(lambda units: Decimal(units).scaleb(-4, Context(prec=40)))
RATE = st.integers(0, 10**18 - 1).map(lambda units: Decimal(units).scaleb(-8, Context(prec=40)))
HALVES = st.tuples(st.integers(-(10**6), 10**6).map(lambda n: Decimal(2 * n + 1).scaleb(-4)), st.just(Decimal("0.5")))


@settings(deadline=None)
@given(st.lists(st.tuples(AMOUNT, RATE) | HALVES, max_size=20))
def test_conversion_is_exact_and_rounds_half_even_once(pairs: list[tuple[Decimal, Decimal]]) -> None:
    amounts = pl.Series("a", [a for a, _ in pairs], dtype=pl.Decimal(20, 4))
    rates = pl.Series("r", [r for _, r in pairs], dtype=pl.Decimal(18, 8))
    exact = Context(prec=80)
    expected = [exact.quantize(exact.multiply(a, r), Decimal("0.0001")) for a, r in pairs]
    fitting = [value if abs(value) < Decimal(10) ** 16 else None for value in expected]
    assert to_base_currency(amounts, rates).to_list() == fitting
    assert to_base_currency(amounts, rates).dtype == pl.Decimal(20, 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), AMOUNT), max_size=20))
def test_line_amounts_are_exact(lines: list[tuple[int, Decimal]]) -> None:
    exact = Context(prec=80)
    expected = [exact.multiply(price, Decimal(quantity)) for quantity, price in lines]
    found = line_amounts(
        pl.Series([q for q, _ in lines], dtype=pl.Int32), pl.Series([p for _, p in lines], dtype=pl.Decimal(20, 4))
    )
    assert found.to_list() == [value if abs(value) < Decimal(10) ** 16 else None for value in expected]


def test_null_stays_null() -> None:
    amounts = pl.Series([None, Decimal(1), Decimal(1)], dtype=pl.Decimal(20, 4))
    rates = pl.Series([Decimal(2), None, Decimal(2)], dtype=pl.Decimal(18, 8))
    assert to_base_currency(amounts, rates).to_list() == [None, None, Decimal(2)]
    assert line_amounts(pl.Series([None, 2, 2], dtype=pl.Int32), amounts).to_list() == [None, Decimal(2), Decimal(2)]
