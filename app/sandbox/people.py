"""Generated customers. A person is a pure function of the seed and a number, so none has to be stored.

A person has an e-mail address, perhaps a second one, a phone, an address (a quarter share it with their household),
devices and cards. Parts of that appear in `users` rows (a web account, sometimes a second one, a loyalty card in the
stores) and in marketplace orders, which need no account.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from app.sandbox.places import COUNTRIES, Country

DAY = 86_400_000
DOMAINS = ("example.com", "example.org", "example.net", "mail.example", "inbox.example", "post.example")
USERS_PER_PERSON = 4
FIRST_USER_ID = 1000
CHANGE_EVERY = 150 * DAY
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class PersonProfile:
    """A person's contact data at one time. `phone` is E.164."""

    email: str
    phone: str
    street: str
    city: str

    @property
    def address(self) -> str:
        return f"{self.street}, {self.city}"


@dataclass(frozen=True)
class SandboxPerson:
    """One customer. Times are milliseconds since 1970; `web`, `second` and `card` are user ids."""

    number: int
    joined: int
    first: str
    last: str
    country: Country
    first_profile: PersonProfile
    other_email: str
    own_phone: bool
    web: int | None
    second: int | None
    card: int | None
    loyalty_id: str | None
    devices: tuple[str, ...]
    ip: str
    cards: tuple[str, ...]
    platforms: tuple[str, ...]
    activity: float
    first_change: int | None
    leaves: int | None
    email_verified: bool
    phone_given: bool
    phone_verified: bool
    card_shows: int

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    @property
    def key(self) -> str:
        return f"person-{self.number}"


def mixed(seed: int, number: int, salt: int) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the arguments."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + salt * 0x94D049BB133111EB) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((value ^ (value >> 31)) >> 11) / (1 << 53)


def activity(seed: int, number: int) -> float:
    """Return how often a person orders, relative to the most loyal customers."""
    draw = mixed(seed, number, 1)
    return 1.0 if draw < 0.15 else 0.5 if draw < 0.45 else 0.2


def phone_number(country: Country, number: int, version: int) -> str:
    """Return a mobile phone number (E.164) of the country, unique per person."""
    room = 10**country.subscriber_digits
    spread = (number * 7_368_787 + version * 1_299_709 + 2_345_678) % (room // 10 * 8)
    prefix = country.prefixes[(number + version) % len(country.prefixes)]
    return f"+{country.dial}{prefix}{spread + room // 10 * 2:0{country.subscriber_digits}d}"


def street_address(seed: int, country: Country, household: int, version: int) -> tuple[str, str]:
    """Return (street with number, city) of a household. version: the number of its moves."""
    random = mixed(seed, household, 20 + version)
    if random < 0.012:
        tower = (
            *("Menara Satu, Jl. Thamrin 10", "Harbour Tower, 1 Bay Street", "Stadthaus, Ringstraße 5"),
            *("Minato Tower 2-1", "Raffles Court 8"),
        )
        return tower[COUNTRIES.index(country)], country.cities[0]
    place = household * 31 + version * 17 + int(random * 1000)
    street = country.streets[place % len(country.streets)]
    house = 1 + (household * 7 + version * 3) % 199
    flat = (household // 50) % 90
    city = country.cities[int(random * 7919) % len(country.cities)]
    code = 10_000 + (household * 37 + version * 101) % 80_000
    unit = f" No. {flat}" if flat else ""
    return f"{street} {house}{unit}, {code:05d}", city


def make_person(seed: int, number: int, joined: int) -> SandboxPerson:
    """Return the person with this number."""
    random = Random((seed << 40) ^ (number * 2_654_435_761 + 12_345))
    household = number // 3
    shares_home = mixed(seed, household, 2) < 0.25
    home = household * 3 if shares_home else number
    draw = mixed(seed, home if shares_home else number, 3)
    country = COUNTRIES[-1]
    for candidate in COUNTRIES:
        if draw < candidate.share:
            country = candidate
            break
        draw -= candidate.share
    first = random.choice(country.first_names)
    if shares_home:
        # members of a household have different first names
        base = int(mixed(seed, household, 7) * len(country.first_names))
        first = country.first_names[(base + 7 * (number % 3)) % len(country.first_names)]
    last = Random((seed << 20) ^ home).choice(country.last_names)
    own_phone = not (shares_home and number % 3 == 1 and mixed(seed, household, 4) < 0.02)
    phone = phone_number(country, number if own_phone else home, 0)
    street, city = street_address(seed, country, home, 0)
    handle = f"{_plain(first)}.{_plain(last)}{number:x}"
    domain = random.choice(DOMAINS)
    kind = random.random()
    has_web, has_card = kind < 0.72, 0.56 < kind < 0.84
    first_id = FIRST_USER_ID + number * USERS_PER_PERSON
    phone_given = random.random() < 0.8
    second = has_web and own_phone and random.random() < 0.06
    devices = [f"d-{random.getrandbits(44):011x}" for _ in range(1 + (random.random() < 0.35))]
    if shares_home and mixed(seed, household, 5) < 0.02:
        devices.append(f"d-{int(mixed(seed, household, 6) * (1 << 44)):011x}")
    platforms = tuple(random.sample(country.platforms, min(len(country.platforms), 1 + (random.random() < 0.4))))
    changes = random.random() < 0.12
    leaves = random.random() < 0.03
    return SandboxPerson(
        number=number,
        joined=joined,
        first=first,
        last=last,
        country=country,
        first_profile=PersonProfile(f"{handle}@{domain}", phone, street, city),
        other_email=f"{_plain(first)[0]}{_plain(last)}{number:x}@{random.choice(DOMAINS)}",
        own_phone=own_phone,
        web=first_id if has_web else None,
        second=first_id + 1 if second else None,
        card=first_id + 2 if has_card else None,
        loyalty_id=f"L{100_000 + number}" if has_card else None,
        devices=tuple(devices),
        ip=".".join(map(str, (random.choice((36, 103, 114, 180, 73, 84)), *(random.randrange(1, 255) for _ in range(3))))),
        cards=tuple(f"card-{random.getrandbits(48):012x}" for _ in range(1 + (random.random() < 0.3))),
        platforms=platforms,
        activity=activity(seed, number),
        first_change=joined + random.randrange(5 * DAY, 120 * DAY) if changes else None,
        leaves=joined + random.randrange(20 * DAY, 400 * DAY) if leaves else None,
        email_verified=random.random() < 0.8,
        phone_given=phone_given or second,
        phone_verified=(phone_given or second) and own_phone and random.random() < 0.7,
        card_shows=random.randrange(4),
    )


def changes_until(person: SandboxPerson, time: int) -> int:
    """Return the number of profile changes that the person has made by this time."""
    if person.first_change is None or time < person.first_change:
        return 0
    return 1 + (time - person.first_change) // CHANGE_EVERY


def change_time(person: SandboxPerson, count: int) -> int | None:
    """Return when the person makes the n-th change (from 1), or None."""
    return None if person.first_change is None else person.first_change + (count - 1) * CHANGE_EVERY


def changed_field(seed: int, person: SandboxPerson, count: int) -> str:
    """Return the field of the n-th change: `address`, `phone` or `email`."""
    draw = mixed(seed, person.number, 100 + count)
    return "address" if draw < 0.6 or not person.own_phone else "phone" if draw < 0.85 else "email"


def profile_at(seed: int, person: SandboxPerson, time: int) -> PersonProfile:
    """Return the person's profile at a time."""
    profile = person.first_profile
    for count in range(1, changes_until(person, time) + 1):
        field = changed_field(seed, person, count)
        if field == "address":
            street, city = street_address(seed, person.country, person.number, count)
            profile = PersonProfile(profile.email, profile.phone, street, city)
        elif field == "phone":
            profile = PersonProfile(
                profile.email, phone_number(person.country, person.number, count), profile.street, profile.city
            )
        else:
            handle, _, domain = person.first_profile.email.partition("@")
            profile = PersonProfile(f"{handle}.{count}@{domain}", profile.phone, profile.street, profile.city)
    return profile


def spelled_phone(random: Random, phone: str, country: Country) -> str:
    """Return the phone number as people of the country might type it."""
    national = phone[1 + len(country.dial) :]
    grouped = f"{national[:3]}-{national[3:7]}-{national[7:]}".rstrip("-")
    style = random.randrange(5)
    if style == 0:
        return phone
    if style == 1:
        return f"{country.trunk}{national}"
    if style == 2:
        return f"{country.trunk}{grouped}"
    if style == 3:
        return f"+{country.dial} {grouped}"
    return f"({country.trunk}{national[:3]}) {national[3:6]} {national[6:]}"


def with_typo(random: Random, text: str) -> str:
    """Return the text with two adjacent letters swapped, one missing, or one doubled."""
    at = random.randrange(1, max(2, len(text) - 2))
    style = random.randrange(3)
    if style == 0:
        return text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if style == 1 else text[:at] + text[at] + text[at:]


def _plain(name: str) -> str:
    table = str.maketrans({"ü": "ue", "ö": "oe", "ä": "ae", "ß": "ss"})
    return name.lower().translate(table)
