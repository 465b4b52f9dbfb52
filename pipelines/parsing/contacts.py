"""Contacts in one spelling: e-mail addresses, phone numbers, names, postal addresses.

Two spellings of one contact must give one value, and a value that says nothing (masked, a placeholder, not
dialable) must give None: a wrong contact would make one customer out of two strangers. The functions on polars
Series work on the distinct values only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

import phonenumbers
import polars as pl

UNKNOWN_REGION = "ZZ"
"""Region of a number that may come from anywhere: only the international spelling can be read."""

PLATFORM_COUNTRY = {
    "tokopedia": "ID",
    "bukalapak": "ID",
    "blibli": "ID",
    "shopee": "ID",
    "lazada": "ID",
    "amazon": "US",
    "ebay": "US",
    "etsy": "US",
    "walmart": "US",
    "rakuten": "JP",
    "mercari": "JP",
    "zalando": "DE",
    "otto": "DE",
    "coupang": "KR",
    "gmarket": "KR",
    "flipkart": "IN",
    "allegro": "PL",
    "bol": "NL",
    "cdiscount": "FR",
}
"""The home country of each marketplace (ISO 3166-1 alpha-2)."""

MANY_COUNTRIES = frozenset({"shopee", "lazada", "amazon", "ebay", "etsy", "zalando"})
"""Marketplaces that sell in several countries: there the currency says more than the home country."""

CURRENCY_COUNTRY = {
    "IDR": "ID", "JPY": "JP", "KRW": "KR", "GBP": "GB", "MYR": "MY", "SGD": "SG", "THB": "TH", "PHP": "PH", "VND": "VN",
    "INR": "IN", "AUD": "AU", "NZD": "NZ", "CAD": "CA", "CHF": "CH", "SEK": "SE", "NOK": "NO", "DKK": "DK", "PLN": "PL",
    "CZK": "CZ", "HUF": "HU", "TRY": "TR", "BRL": "BR", "MXN": "MX", "TWD": "TW", "HKD": "HK", "CNY": "CN", "AED": "AE",
    "SAR": "SA", "ZAR": "ZA", "ILS": "IL", "EGP": "EG", "CLP": "CL", "COP": "CO",
}  # fmt: skip
"""Currencies of one country. USD and EUR are not here: too many countries quote in them."""

_GMAIL = frozenset({"gmail.com", "googlemail.com"})
_EMAIL = re.compile(r"[^\s@<>,;:()\[\]\"*\\…•]{1,64}@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_](?:[\w-]{0,61}[^\W_]))")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_MASKED_PHONE = re.compile(r"[*•●#?]|[xX]{2,}|[eE]\+")
_PHONE_NOISE = re.compile(r"[\s().\-‐‑‒–—―_]+")
_PHONE_PARTS = re.compile(r"[/;,|&]| or | atau ")
_NOT_WORD = re.compile(r"[\W_]+")
_APOSTROPHE = re.compile("['’`´ʼ]")
_LEADING_ZEROS = re.compile(r"\b0+(?=\d)")

_TITLES = frozenset(
    {
        "mr", "mrs", "ms", "miss", "mx", "dr", "prof", "sir", "madam", "herr", "frau", "fr", "hr", "m", "mme", "mlle",
        "sr", "sra", "bpk", "bapak", "pak", "ibu", "bu", "sdr", "sdri", "tn", "ny", "nn", "h", "hj", "ir", "drs", "dra",
    }
)  # fmt: skip
_AFTER_NAME = frozenset(
    {
        "jr", "sr", "ii", "iii", "iv", "phd", "md", "mba", "ma", "ba", "bsc", "msc",
        "skom", "se", "sh", "st", "spd", "mm", "msi", "mkom", "ssi", "amd", "sked", "skm",
    }
)  # fmt: skip
_ADDRESS_WORDS = {
    "jl": "jalan", "jln": "jalan", "gg": "gang", "kav": "kavling", "blk": "blok", "perum": "perumahan", "komp": "komplek",
    "kompleks": "komplek", "kel": "kelurahan", "kec": "kecamatan", "kab": "kabupaten", "ds": "desa", "lt": "lantai",
    "st": "street", "str": "street", "strasse": "street", "rd": "road", "ave": "avenue", "av": "avenue", "blvd": "boulevard",
    "ln": "lane", "dr": "drive", "ct": "court", "sq": "square", "pl": "place", "hwy": "highway", "pkwy": "parkway",
    "apt": "apartment", "apartemen": "apartment", "ste": "suite", "fl": "floor", "bldg": "building",
    "n": "north", "s": "south", "e": "east", "w": "west",
}  # fmt: skip
_ADDRESS_SILENT = frozenset({"no", "nr", "nomor", "number", "num", "nomer"})


def _plain(text: str) -> str:
    """Compatibility-normalised, without invisible characters, trimmed."""
    if text.isascii():
        return text.strip()
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).strip()


def _without_accents(text: str) -> str:
    """Lower case without accents: é and e are one letter."""
    if text.isascii():
        return text.lower()
    return "".join(letter for letter in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(letter))


def normalise_email(raw: str | None) -> str | None:
    """One spelling of an e-mail address, or None if it is none (or is masked).

    Trimmed, lower case, NFKC; 'mailto:' and 'Name <address>' are taken off; a domain in ASCII. Gmail ignores dots
    and everything after '+', so do we for gmail.com and googlemail.com; other providers are left alone.
    """
    if raw is None:
        return None
    text = _plain(raw).lower()
    if text.endswith(">") and "<" in text:
        text = text[text.rindex("<") + 1 : -1].strip()
    if text.startswith("mailto:"):
        text = text[7:].partition("?")[0].strip()
    text = text.rstrip(".")
    found = _EMAIL.fullmatch(text)
    if found is None:
        return None
    local, _, domain = text.rpartition("@")
    if local.startswith(".") or local.endswith(".") or ".." in local:
        return None
    if not domain.isascii():
        try:
            domain = domain.encode("idna").decode("ascii")
        except UnicodeError:
            return None
    if domain in _GMAIL:
        local = local.partition("+")[0].replace(".", "")
        domain = "gmail.com"
    return f"{local}@{domain}" if local else None


def normalise_phone(raw: str | None, region: str) -> str | None:
    """E.164 of a phone number in any local spelling of `region` (ISO 3166-1 alpha-2), or None.

    A reading that is valid in its numbering plan wins; else one whose length is possible (plans grow faster than
    their description). Masked numbers and placeholders ('0000000000') give None. An extension is left out.
    """
    if raw is None:
        return None
    text = _plain(raw)
    if text.lower().startswith("tel:"):
        text = text[4:].partition(";")[0]
    if not text or _MASKED_PHONE.search(text):
        return None
    if text.endswith(".0") and text[:-2].isdigit():
        text = text[:-2]
    whole = _e164(_PHONE_NOISE.sub("", text), region)
    if whole is not None or not _PHONE_PARTS.search(text):
        return whole
    parts = (_e164(_PHONE_NOISE.sub("", part), region) for part in _PHONE_PARTS.split(text))
    return next((part for part in parts if part is not None), None)


@lru_cache(maxsize=262_144)
def _e164(compact: str, region: str) -> str | None:
    digits = compact.lstrip("+")
    if len(digits) < 6:
        return None
    if compact.startswith("+"):
        readings: list[tuple[str, str | None]] = [(compact, None)]
    elif digits.startswith("00"):
        readings = [("+" + digits[2:], None)]
    else:
        # a country code without its '+' is common, but only believed where the local reading fails
        readings = [] if region == UNKNOWN_REGION else [(digits, region)]
        readings += [("+" + digits, None)] if len(digits) > 10 else []
    numbers = []
    for text, of in readings:
        number = _parse(text, of)
        if number is not None and phonenumbers.is_valid_number(number):
            return _formatted(number)
        numbers.append(number)
    return next((_formatted(n) for n in numbers if n is not None and phonenumbers.is_possible_number(n)), None)


def _formatted(number: phonenumbers.PhoneNumber) -> str | None:
    if _placeholder(str(number.national_number)):
        return None
    return str(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164))


def _parse(text: str, region: str | None) -> phonenumbers.PhoneNumber | None:
    try:
        return phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        return None


def _placeholder(national: str) -> bool:
    """'00000000', '8111111111' or '1234567890': typed to get past a form."""
    return len(set(national[1:])) == 1 or national in "01234567890" or national in "9876543210"


def phone_region(country: str | None = None, currency: str | None = None, platform: str | None = None) -> str | None:
    """The region (ISO 3166-1 alpha-2) that a record's phone numbers are written for; None when nothing tells.

    The country if there is one; else the platform's home; where the platform sells in many countries, the currency's
    country. `UNKNOWN_REGION` when it could be any of several (a pan-European sale in EUR).
    """
    if country and re.fullmatch(r"[A-Za-z]{2}", country.strip()):
        code = country.strip().upper()
        return "GB" if code == "UK" else code
    name = platform.strip().lower() if platform else ""
    money = currency.strip().upper() if currency else ""
    home = PLATFORM_COUNTRY.get(name)
    if home is not None and name not in MANY_COUNTRIES:
        return home
    if money in CURRENCY_COUNTRY:
        return CURRENCY_COUNTRY[money]
    if money == "EUR" and home != "DE":
        return UNKNOWN_REGION
    if home is not None:
        return home
    return "US" if money == "USD" and not name else None


def normalise_name(raw: str | None) -> str | None:
    """A person's name for comparison: lower case, no accents, titles, degrees or punctuation; 'Last, First' turned round."""
    if raw is None:
        return None
    before, _, after = _plain(raw).partition(",")
    first, last = _words(_APOSTROPHE.sub("", _without_accents(after))), _words(_APOSTROPHE.sub("", _without_accents(before)))
    if all(word.replace(".", "") in _AFTER_NAME for word in _without_accents(after).split()):
        first = []
    words = first + last
    # one letter before a single name is its owner's initial: 'H. Setiawan' is Hendra, 'H. Agus Setiawan' made the hajj
    while words and words[0] in _TITLES and len(words) > (2 if len(words[0]) == 1 else 1):
        words = words[1:]
    return " ".join(words) or None


def normalise_address(raw: str | None) -> str | None:
    """A postal address for comparison: lower case, no accents or punctuation, usual abbreviations written out,
    'No.' and leading zeros of numbers left out."""
    if raw is None:
        return None
    words = _words(_LEADING_ZEROS.sub("", _without_accents(_plain(raw))))
    return " ".join(_ADDRESS_WORDS.get(word, word) for word in words if word not in _ADDRESS_SILENT) or None


def _words(text: str) -> list[str]:
    return _NOT_WORD.sub(" ", text).split()


def _on_distinct(values: pl.Series, function: Callable[[str | None], str | None]) -> pl.Series:
    """`function` of each value, called once per distinct value."""
    distinct = values.cast(pl.String).drop_nulls().unique()
    if distinct.is_empty():
        return pl.Series(values.name, [None] * len(values), dtype=pl.String)
    results = pl.Series([function(value) for value in distinct.to_list()], dtype=pl.String)
    return values.cast(pl.String).replace_strict(distinct, results, default=None, return_dtype=pl.String).alias(values.name)


def normalise_emails(values: pl.Series) -> pl.Series:
    """`normalise_email` of a column of text."""
    return _on_distinct(values, normalise_email)


def normalise_names(values: pl.Series) -> pl.Series:
    """`normalise_name` of a column of text."""
    return _on_distinct(values, normalise_name)


def normalise_addresses(values: pl.Series) -> pl.Series:
    """`normalise_address` of a column of text."""
    return _on_distinct(values, normalise_address)


def normalise_phones(values: pl.Series, regions: pl.Series | str) -> pl.Series:
    """`normalise_phone` of a column of text, with one region for all or one per row (null: unknown)."""
    if isinstance(regions, str):
        return _on_distinct(values, lambda value: normalise_phone(value, regions))
    pairs = pl.DataFrame({"raw": values.cast(pl.String), "region": regions.cast(pl.String).fill_null(UNKNOWN_REGION)})
    distinct = pairs.drop_nulls("raw").unique()
    read = [normalise_phone(raw, region) for raw, region in distinct.iter_rows()]
    found = distinct.with_columns(pl.Series("phone", read, dtype=pl.String))
    return pairs.join(found, on=["raw", "region"], how="left", maintain_order="left")["phone"].alias(values.name)


def phone_regions(country: pl.Series, currency: pl.Series | None = None, platform: pl.Series | None = None) -> pl.Series:
    """`region_of` of columns of text; null when nothing tells."""
    nothing = pl.Series([None] * len(country), dtype=pl.String)
    told = pl.DataFrame(
        {
            "country": country.cast(pl.String),
            "currency": nothing if currency is None else currency.cast(pl.String),
            "platform": nothing if platform is None else platform.cast(pl.String),
        }
    )
    distinct = told.unique()
    found = distinct.with_columns(pl.Series("region", [phone_region(*row) for row in distinct.iter_rows()], dtype=pl.String))
    joined = told.join(found, on=["country", "currency", "platform"], how="left", nulls_equal=True, maintain_order="left")
    return joined["region"]
