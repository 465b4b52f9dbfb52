"""Documents of marketplace orders: old and new formats, amounts and phone numbers in several spellings."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any

from bson import ObjectId

from app.sandbox.catalogue import Product, decimal_text
from app.sandbox.people import PersonProfile, SandboxPerson, spelled_phone, with_typo
from app.sandbox.places import HOME_OF, PLATFORM_CODES, Country

Document = dict[str, Any]


@dataclass(frozen=True)
class MarketplaceLine:
    """One line of a basket; `price` in minor units of the country's currency."""

    product: int
    quantity: int
    price: int


def order_number(platform: str, number: int) -> str:
    """Return the marketplace's order id."""
    return f"ORD-{PLATFORM_CODES[platform]}-{number}"


def object_id(seed: int, time: int, number: int) -> ObjectId:
    """Return the `_id` of the n-th document; the same seed gives the same ids."""
    return ObjectId(f"{time // 1000 & 0xFFFFFFFF:08x}{seed & 0xFFFFFFFF:08x}{number & 0xFFFFFFFF:08x}")


def moment(time: int) -> datetime:
    """Return milliseconds since 1970 as a datetime."""
    return datetime.fromtimestamp(time / 1000, UTC)


def plain_amount(minor: int, country: Country) -> int | float:
    """Return an amount as a number: an int if the currency has no minor units, otherwise a double."""
    return minor if country.digits == 0 else minor / 100


def spelled_amount(random: Random, minor: int, country: Country) -> int | float | str:
    """Return an amount in one of the spellings that marketplaces use for this currency."""
    style = random.random()
    if style < 0.6:
        return plain_amount(minor, country)
    if country.currency == "IDR":
        dotted = f"{minor:,}".replace(",", ".")
        return dotted if style < 0.72 else f"Rp {dotted}" if style < 0.84 else f"{minor:,}.00" if style < 0.92 else float(minor)
    if country.digits == 0:
        return f"{minor:,}.00" if style < 0.8 else float(minor)
    text = decimal_text(minor, 2)
    return text if style < 0.8 else f"{int(text[:-3]):,}{text[-3:]}"


def service_phone(country: Country) -> str:
    """Return the phone number of a parcel shop, which many buyers enter instead of their own."""
    return f"+{country.dial}{country.prefixes[0]}{'55500000'[: country.subscriber_digits]}"


def contact(random: Random, person: SandboxPerson, profile: PersonProfile, platform: str) -> Document:
    """Return the buyer's contact fields. Most have an e-mail address or a phone number; some only a name and an address."""
    draw = random.random()
    email = profile.email
    # the second e-mail address is used only with the own phone number, so every buyer remains identifiable
    if draw < 0.45 and person.own_phone and person.phone_given and random.random() < 0.12:
        email = person.other_email
    style = random.random()
    email = email.upper() if style < 0.04 else email.title() if style < 0.08 else f" {email} " if style < 0.11 else email
    phone = spelled_phone(random, profile.phone, person.country)
    if HOME_OF[platform] != person.country.code:
        phone = profile.phone
    name, address = person.name, profile.address
    given: Document = {}
    if draw < 0.45:
        given = {"user_email": email, "buyer_phone": phone}
    elif draw < 0.70:
        given = {"user_email": email}
    elif draw < 0.925:
        given = {"user_email": email} if not (person.own_phone and person.phone_given) else {"buyer_phone": phone}
    elif draw < 0.95:
        # an identifier shared by many people, next to a good one
        if person.own_phone and person.phone_given and draw < 0.937:
            given = {"user_email": "noreply@marketplace.example", "buyer_phone": phone}
        elif person.country.code != "ID":
            given = {"user_email": email}
        else:
            given = {"user_email": email, "buyer_phone": service_phone(person.country)}
    elif random.random() < 0.25:
        name = with_typo(random, name)
        address = with_typo(random, address) if random.random() < 0.4 else address
    spelling = random.random()
    name = (
        name.upper()
        if spelling < 0.08
        else name.lower()
        if spelling < 0.12
        else f"{person.last}, {person.first}"
        if spelling < 0.14
        else name
    )
    if given and random.random() < 0.15:
        return given | {"buyer_name": name}
    return given | {"buyer_name": name, "shipping_address": address}


def items(random: Random, lines: list[MarketplaceLine], catalogue: tuple[Product, ...], country: Country) -> list[Document]:
    """Return the lines in the format of the marketplace."""
    written: list[Document] = []
    for line in lines:
        product = catalogue[line.product]
        item: Document = {"product_id": product.product_id, "product_name": product.name}
        if random.random() < 0.5:
            item["variant"] = random.choice(
                (
                    {"size": "42", "colour": "red"},
                    {"size": "M"},
                    {"colour": "navy", "gift": True},
                    "one size",
                    {"pack": {"of": 2}},
                )
            )
        item["quantity"] = line.quantity
        item["price"] = (
            plain_amount(line.price, country) if random.random() < 0.93 else spelled_amount(random, line.price, country)
        )
        written.append(item)
    return written


def document(
    random: Random,
    identifier: ObjectId,
    platform: str,
    number: str,
    buyer: Document,
    lines: list[MarketplaceLine],
    catalogue: tuple[Product, ...],
    country: Country,
    status: str,
    placed: int,
    updated: int,
    old: bool,
) -> Document:
    """Return one marketplace order. old: with a product name and no items. Times are milliseconds since 1970."""
    total = sum(line.quantity * line.price for line in lines)
    content: Document = {"_id": identifier, "mp_order_id": number, "platform": platform} | buyer
    if old:
        content["product_name"] = catalogue[lines[0].product].name
    else:
        content["items"] = items(random, lines, catalogue, country)
    content |= {"amount": spelled_amount(random, total, country), "currency": country.currency, "status": status}
    content |= {"order_time": moment(placed), "updated_at": moment(updated)}
    draw = random.random()
    if draw < 0.003:
        del content["status"]
    elif draw < 0.006:
        del content["currency"]
    elif draw < 0.008:
        del content["updated_at"]
    return content


def unreadable(random: Random, identifier: ObjectId, number: int, placed: int) -> Document:
    """Return a document that violates the contract: no order id, an invalid time, or an invalid amount."""
    content: Document = {
        "_id": identifier,
        "mp_order_id": f"ORD-XX-{number}",
        "platform": "tokopedia",
        "currency": "IDR",
        "status": "paid",
    }
    content |= {"amount": 100_000, "product_name": "Mystery box", "order_time": moment(placed), "updated_at": moment(placed)}
    style = random.randrange(3)
    if style == 0:
        del content["mp_order_id"]
    elif style == 1:
        content["order_time"] = "last tuesday"
    else:
        content["amount"] = "ask the seller"
    return content
