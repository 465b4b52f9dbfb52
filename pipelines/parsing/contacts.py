"""Normalisation of contacts: e-mail addresses, phone numbers, names, postal addresses.

Different spellings of a contact are normalised to one value. A value that identifies no one (masked, a placeholder, not
dialable) becomes None: a wrong contact would merge two strangers into one customer. The functions on polars Series
process each distinct value once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

import phonenumbers
import polars as pl

UNKNOWN_REGION = "ZZ"
"""Region of a number from an unknown country: only its international form can be read."""

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
"""Home country of each marketplace (ISO 3166-1 alpha-2)."""

MULTI_COUNTRY_PLATFORMS = frozenset({"shopee", "lazada", "amazon", "ebay", "etsy", "zalando"})
"""Marketplaces that sell in several countries: the currency is a better indication than the home country."""

CURRENCY_COUNTRY = {
    "IDR": "ID", "JPY": "JP", "KRW": "KR", "GBP": "GB", "MYR": "MY", "SGD": "SG", "THB": "TH", "PHP": "PH", "VND": "VN",
    "INR": "IN", "AUD": "AU", "NZD": "NZ", "CAD": "CA", "CHF": "CH", "SEK": "SE", "NOK": "NO", "DKK": "DK", "PLN": "PL",
    "CZK": "CZ", "HUF": "HU", "TRY": "TR", "BRL": "BR", "MXN": "MX", "TWD": "TW", "HKD": "HK", "CNY": "CN", "AED": "AE",
    "SAR": "SA", "ZAR": "ZA", "ILS": "IL", "EGP": "EG", "CLP": "CL", "COP": "CO",
}  # fmt: skip
"""Currencies of a single country. USD and EUR are excluded: many countries use them."""

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
_NAME_SUFFIXES = frozenset(
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
_IGNORED_ADDRESS_WORDS = frozenset({"no", "nr", "nomor", "number", "num", "nomer"})


def _plain(text: str) -> str:
    """Return the text in NFKC, trimmed, without invisible characters."""
    if text.isascii():
        return text.strip()
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).strip()


def _without_accents(text: str) -> str:
    """Return the text in lower case without accents."""
    if text.isascii():
        return text.lower()
    return "".join(letter for letter in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(letter))


def normalise_email(raw: str | None) -> str | None:
    """Return an e-mail address in its normal form, or None if it is invalid or masked.

    The form is NFKC, trimmed, lower case, with the domain in ASCII, without 'mailto:' and 'Name <...>'. For gmail.com and
    googlemail.com, dots and everything after '+' are removed, because Gmail ignores them; other providers are not changed.
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
    """Return a phone number, in any local form of `region` (ISO 3166-1 alpha-2), as E.164, or None.

    An interpretation that is valid in its numbering plan is preferred to one with merely a possible length (the descriptions of
    plans lag behind the plans). Masked numbers and placeholders ('0000000000') are None. Extensions are removed.
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
    """Return a number without separators as E.164, or None."""
    digits = compact.lstrip("+")
    if len(digits) < 6:
        return None
    if compact.startswith("+"):
        readings: list[tuple[str, str | None]] = [(compact, None)]
    elif digits.startswith("00"):
        readings = [("+" + digits[2:], None)]
    else:
        # a country code without '+' is common, but a local number is more likely
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
    if _is_placeholder(str(number.national_number)):
        return None
    return str(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164))


def _parse(text: str, region: str | None) -> phonenumbers.PhoneNumber | None:
    try:
        return phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        return None


def _is_placeholder(national: str) -> bool:
    """Return whether a number is a form filler: '00000000', '8111111111' or '1234567890'."""
    return len(set(national[1:])) == 1 or national in "01234567890" or national in "9876543210"


def phone_region(country: str | None = None, currency: str | None = None, platform: str | None = None) -> str | None:
    """Return the region (ISO 3166-1 alpha-2) of a record's local phone numbers; None when unknown.

    It is the country if there is one, else the home country of the platform; for a platform that sells in several countries,
    the country of the currency. `UNKNOWN_REGION` if several are possible (a pan-European sale in EUR).
    """
    if country and re.fullmatch(r"[A-Za-z]{2}", country.strip()):
        code = country.strip().upper()
        return "GB" if code == "UK" else code
    name = platform.strip().lower() if platform else ""
    money = currency.strip().upper() if currency else ""
    home = PLATFORM_COUNTRY.get(name)
    if home is not None and name not in MULTI_COUNTRY_PLATFORMS:
        return home
    if money in CURRENCY_COUNTRY:
        return CURRENCY_COUNTRY[money]
    if money == "EUR" and home != "DE":
        return UNKNOWN_REGION
    if home is not None:
        return home
    return "US" if money == "USD" and not name else None


def normalise_name(raw: str | None) -> str | None:
    """Return a person's name for comparison: lower case, no accents, titles, degrees or punctuation; 'Last, First' reversed."""
    if raw is None:
        return None
    before, _, after = _plain(raw).partition(",")
    first, last = _words(_APOSTROPHE.sub("", _without_accents(after))), _words(_APOSTROPHE.sub("", _without_accents(before)))
    if all(word.replace(".", "") in _NAME_SUFFIXES for word in _without_accents(after).split()):
        first = []
    words = first + last
    # a letter before a single name is an initial ('H. Setiawan'); before several names it is a title ('H. Agus Setiawan')
    while words and words[0] in _TITLES and len(words) > (2 if len(words[0]) == 1 else 1):
        words = words[1:]
    return " ".join(words) or None


def normalise_address(raw: str | None) -> str | None:
    """Return a postal address for comparison: lower case, no accents or punctuation, common abbreviations expanded.

    'No.' and leading zeros of numbers are removed.
    """
    if raw is None:
        return None
    words = _words(_LEADING_ZEROS.sub("", _without_accents(_plain(raw))))
    return " ".join(_ADDRESS_WORDS.get(word, word) for word in words if word not in _IGNORED_ADDRESS_WORDS) or None


def _words(text: str) -> list[str]:
    return _NOT_WORD.sub(" ", text).split()


def _on_distinct(values: pl.Series, function: Callable[[str | None], str | None]) -> pl.Series:
    """Apply `function` to a column, once per distinct value."""
    distinct = values.cast(pl.String).drop_nulls().unique()
    if distinct.is_empty():
        return pl.Series(values.name, [None] * len(values), dtype=pl.String)
    results = pl.Series([function(value) for value in distinct.to_list()], dtype=pl.String)
    return values.cast(pl.String).replace_strict(distinct, results, default=None, return_dtype=pl.String).alias(values.name)


def normalise_emails(values: pl.Series) -> pl.Series:
    """Apply `normalise_email` to a column of text."""
    return _on_distinct(values, normalise_email)


def normalise_names(values: pl.Series) -> pl.Series:
    """Apply `normalise_name` to a column of text."""
    return _on_distinct(values, normalise_name)


def normalise_addresses(values: pl.Series) -> pl.Series:
    """Apply `normalise_address` to a column of text."""
    return _on_distinct(values, normalise_address)


def normalise_phones(values: pl.Series, regions: pl.Series | str) -> pl.Series:
    """Apply `normalise_phone` to a column of text, with one region for all rows or one per row (null: unknown)."""
    if isinstance(regions, str):
        return _on_distinct(values, lambda value: normalise_phone(value, regions))
    pairs = pl.DataFrame({"raw": values.cast(pl.String), "region": regions.cast(pl.String).fill_null(UNKNOWN_REGION)})
    distinct = pairs.drop_nulls("raw").unique()
    read = [normalise_phone(raw, region) for raw, region in distinct.iter_rows()]
    found = distinct.with_columns(pl.Series("phone", read, dtype=pl.String))
    return pairs.join(found, on=["raw", "region"], how="left", maintain_order="left")["phone"].alias(values.name)


def phone_regions(country: pl.Series, currency: pl.Series | None = None, platform: pl.Series | None = None) -> pl.Series:
    """Apply `phone_region` to columns of text; null when unknown."""
    absent = pl.Series([None] * len(country), dtype=pl.String)
    inputs = pl.DataFrame(
        {
            "country": country.cast(pl.String),
            "currency": absent if currency is None else currency.cast(pl.String),
            "platform": absent if platform is None else platform.cast(pl.String),
        }
    )
    distinct = inputs.unique()
    found = distinct.with_columns(pl.Series("region", [phone_region(*row) for row in distinct.iter_rows()], dtype=pl.String))
    joined = inputs.join(found, on=["country", "currency", "platform"], how="left", nulls_equal=True, maintain_order="left")
    return joined["region"]
