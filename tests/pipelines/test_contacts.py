"""Contacts: spellings of a contact are normalised to one value; a value that identifies no one is None."""

from __future__ import annotations

import phonenumbers
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.parsing import contacts

INDONESIAN = "+6281234567890"


@pytest.mark.parametrize(
    "spelling",
    [
        "0812-3456-7890",
        "0812 3456 7890",
        "(0812) 3456.7890",
        "812 3456 7890",
        "+62 812 3456 7890",
        "+62 (0)812-3456-7890",
        "(+62) 812.3456.7890",
        "62 812-3456-7890",
        "0062 812 3456 7890",
        "tel:+62-812-3456-7890",
        "６２８１２３４５６７８９０",
        "\u200e0812\u00a03456\u00a07890",
        "6281234567890.0",
        "0812-3456-7890 / 0813-1111-2222",
        "+62 812-3456-7890 ext. 12",
    ],
)
def test_spellings_of_a_number_are_equal(spelling: str) -> None:
    assert contacts.normalise_phone(spelling, "ID") == INDONESIAN


@pytest.mark.parametrize(
    ("spelling", "region", "expected"),
    [
        ("(415) 555-2671", "US", "+14155552671"),
        ("1-415-555-2671", "US", "+14155552671"),
        ("07700 900123", "GB", "+447700900123"),
        ("+44 7700 900123", "US", "+447700900123"),
        ("090-1234-5678", "JP", "+819012345678"),
        ("0151 23456789", "DE", "+4915123456789"),
        ("021/5551234", "ID", "+62215551234"),
        ("+39 06 6982", "ID", "+39066982"),
        ("33612345678", contacts.UNKNOWN_REGION, "+33612345678"),
        ("06 12 34 56 78", contacts.UNKNOWN_REGION, None),
        ("0812****7890", "ID", None),
        ("0812xxxx7890", "ID", None),
        ("0000000000", "ID", None),
        ("1234567890", "US", None),
        ("0811111111", "ID", None),
        ("0888888888", "ID", None),
        ("+60 12-345 6789", "MY", None),
        ("6.28123E+11", "ID", None),
        ("n/a", "ID", None),
        ("-", "ID", None),
        ("", "ID", None),
        (None, "ID", None),
    ],
)
def test_numbers_by_region(spelling: str | None, region: str, expected: str | None) -> None:
    assert contacts.normalise_phone(spelling, region) == expected


# Malaysia's example number is 0123456789, which people type to get past a form
REGIONS = sorted((set(contacts.PLATFORM_COUNTRY.values()) | set(contacts.CURRENCY_COUNTRY.values())) - {"MY"})


@settings(deadline=None)
@given(region=st.sampled_from(REGIONS), gaps=st.lists(st.sampled_from(["", " ", "-", ".", "\u00a0"]), min_size=20, max_size=20))
def test_every_format_of_a_number_is_equal(region: str, gaps: list[str]) -> None:
    number = phonenumbers.example_number_for_type(region, phonenumbers.PhoneNumberType.MOBILE)
    assert number is not None
    expected = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    formats = phonenumbers.PhoneNumberFormat
    spellings = [phonenumbers.format_number(number, kind) for kind in (formats.NATIONAL, formats.INTERNATIONAL, formats.RFC3966)]
    spellings.append("".join(digit + gap for digit, gap in zip(expected, gaps, strict=False)))
    spellings.append("00" + expected[1:])
    assert {contacts.normalise_phone(spelling, region) for spelling in spellings} == {expected}


@settings(deadline=None)
@given(st.text(max_size=30), st.sampled_from([*REGIONS, contacts.UNKNOWN_REGION]))
def test_normalised_phone_is_stable(text: str, region: str) -> None:
    found = contacts.normalise_phone(text, region)
    assert found is None or contacts.normalise_phone(found, region) == found


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        (" A.Person@Example.COM ", "a.person@example.com"),
        ("mailto:a@example.com?subject=x", "a@example.com"),
        ("A Person <a@example.com>", "a@example.com"),
        ("a.per.son+shop@googlemail.com", "aperson@gmail.com"),
        ("a.person+shop@example.com", "a.person+shop@example.com"),
        ("ａ@ｅｘａｍｐｌｅ．ｃｏｍ", "a@example.com"),
        ("a\u200b@example.com", "a@example.com"),
        ("a@münchen.example", "a@xn--mnchen-3ya.example"),
        ("a@example.com.", "a@example.com"),
        ("a***n@example.com", None),
        ("+x@gmail.com", None),
        ("a@b@example.com", None),
        ("a..b@example.com", None),
        ("a@example", None),
        ("not given", None),
        ("", None),
        (None, None),
    ],
)
def test_emails(spelling: str | None, expected: str | None) -> None:
    assert contacts.normalise_email(spelling) == expected


@settings(deadline=None)
@given(st.emails())
def test_normalised_email_is_stable(address: str) -> None:
    found = contacts.normalise_email(address)
    assert found is None or (
        contacts.normalise_email(found) == found and contacts.normalise_email(f" {address.upper()} ") == found
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"country": " id "}, "ID"),
        ({"country": "uk"}, "GB"),
        ({"platform": "Tokopedia", "currency": "USD"}, "ID"),
        ({"platform": "shopee", "currency": "SGD"}, "SG"),
        ({"platform": "shopee"}, "ID"),
        ({"platform": "amazon", "currency": "GBP"}, "GB"),
        ({"platform": "amazon", "currency": "EUR"}, contacts.UNKNOWN_REGION),
        ({"platform": "zalando", "currency": "EUR"}, "DE"),
        ({"currency": "USD"}, "US"),
        ({"platform": "another"}, None),
        ({}, None),
    ],
)
def test_regions(given: dict[str, str], expected: str | None) -> None:
    assert contacts.phone_region(**given) == expected


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("Bpk. José  O'Neil", "jose oneil"),
        ("Santoso, Budi", "budi santoso"),
        ("Budi Santoso, S.Kom.", "budi santoso"),
        ("Mr", "mr"),
        ("H. Setiawan", "h setiawan"),
        ("Setiawan, H.", "h setiawan"),
        ("Dr. H Setiawan", "h setiawan"),
        ("M. Rizky", "m rizky"),
        ("H. Agus Setiawan", "agus setiawan"),
        ("Hj Siti Rahayu", "siti rahayu"),
        ("李 小龍", "李 小龍"),
        (" . ", None),
        (None, None),
    ],
)
def test_names(spelling: str | None, expected: str | None) -> None:
    assert contacts.normalise_name(spelling) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Jl. Sudirman No. 05, RT 01/RW 02", "jalan sudirman no 5 rt.1 rw.2"),
        ("12 Main St., Apt 4", "12 MAIN STREET  APARTMENT 4"),
        ("Kav. 7, Blk C", "kavling 7 blok c"),
    ],
)
def test_addresses(one: str, other: str) -> None:
    assert contacts.normalise_address(one) == contacts.normalise_address(other) is not None


def test_columns_equal_single_values() -> None:
    raw = pl.Series("phone", ["0812-3456-7890", None, "0812 3456 7890", "(415) 555-2671", "?"])
    assert contacts.normalise_phones(raw, "ID").to_list() == [
        INDONESIAN,
        None,
        INDONESIAN,
        contacts.normalise_phone("(415) 555-2671", "ID"),
        None,
    ]
    regions = pl.Series(["ID", "ID", "ID", "US", None])
    assert contacts.normalise_phones(raw, regions).to_list() == [INDONESIAN, None, INDONESIAN, "+14155552671", None]
    assert contacts.normalise_emails(pl.Series("e", ["A@x.com", None, "a@X.com"])).to_list() == ["a@x.com", None, "a@x.com"]
    assert contacts.normalise_names(pl.Series("n", [None], dtype=pl.String)).to_list() == [None]
    assert contacts.normalise_addresses(pl.Series("a", [], dtype=pl.String)).to_list() == []
    given = contacts.phone_regions(pl.Series([None, "GB"]), pl.Series(["IDR", None]), pl.Series([None, "tokopedia"]))
    assert given.to_list() == ["ID", "GB"]
