"""Countries with their currency, names, streets, cities, phone numbers and marketplaces; stores and warehouses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    """A country with customers. `nominal`: local currency per US dollar. `digits`: decimals of the currency. `step`: the
    multiple that prices are rounded to, in minor units."""

    code: str
    share: float
    currency: str
    nominal: float
    digits: int
    step: int
    dial: str
    prefixes: tuple[str, ...]
    subscriber_digits: int
    trunk: str
    platforms: tuple[str, ...]
    cities: tuple[str, ...]
    streets: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]


COUNTRIES: tuple[Country, ...] = (
    Country(
        *("ID", 0.50, "IDR", 16000.0, 0, 500, "62", ("812", "813", "857", "878", "896"), 8, "0"),
        platforms=("tokopedia", "shopee", "lazada", "bukalapak"),
        cities=("Jakarta", "Surabaya", "Bandung", "Medan", "Semarang", "Denpasar", "Makassar", "Yogyakarta"),
        streets=(
            *("Jl. Merdeka", "Jl. Sudirman", "Jl. Diponegoro", "Jl. Gajah Mada", "Jl. Ahmad Yani", "Jl. Pahlawan", "Jl. Melati"),
            *(
                "Jl. Mawar",
                "Jl. Kenanga",
                "Jl. Cendana",
                "Jl. Flamboyan",
                "Jl. Anggrek",
                "Jl. Veteran",
                "Jl. Pemuda",
                "Jl. Kartini",
            ),
        ),
        first_names=(
            *(
                "Budi",
                "Siti",
                "Agus",
                "Dewi",
                "Rizky",
                "Putri",
                "Andi",
                "Rina",
                "Joko",
                "Wulan",
                "Hendra",
                "Maya",
                "Fajar",
                "Indah",
            ),
            *(
                "Bayu",
                "Ratna",
                "Dimas",
                "Lestari",
                "Eko",
                "Sari",
                "Yusuf",
                "Nadia",
                "Arif",
                "Intan",
                "Galih",
                "Ayu",
                "Reza",
                "Kartika",
            ),
        ),
        last_names=(
            *(
                "Santoso",
                "Wijaya",
                "Saputra",
                "Hidayat",
                "Nugroho",
                "Kusuma",
                "Pratama",
                "Setiawan",
                "Halim",
                "Gunawan",
                "Siregar",
            ),
            *("Nasution", "Permana", "Susanto", "Ramadhan", "Utami", "Hakim", "Lubis", "Rahayu", "Wibowo", "Suryadi", "Maulana"),
        ),
    ),
    Country(
        *("US", 0.22, "USD", 1.0, 2, 1, "1", ("415", "212", "646", "312", "206", "512", "617"), 7, ""),
        platforms=("amazon", "ebay"),
        cities=("San Francisco", "New York", "Chicago", "Seattle", "Austin", "Boston", "Denver"),
        streets=(
            *("Oak Street", "Maple Avenue", "Cedar Lane", "Washington Street", "Lake Drive", "Hill Road", "Park Avenue"),
            *("Elm Street", "Sunset Boulevard", "River Road", "Pine Street", "Main Street", "Church Street"),
        ),
        first_names=(
            *(
                "James",
                "Mary",
                "Robert",
                "Linda",
                "Michael",
                "Susan",
                "David",
                "Karen",
                "Daniel",
                "Nancy",
                "Kevin",
                "Laura",
                "Brian",
            ),
            *(
                "Emily",
                "Jason",
                "Megan",
                "Eric",
                "Rachel",
                "Adam",
                "Nicole",
                "Tyler",
                "Amber",
                "Aaron",
                "Julia",
                "Carlos",
                "Sofia",
            ),
        ),
        last_names=(
            *(
                "Smith",
                "Johnson",
                "Williams",
                "Brown",
                "Jones",
                "Garcia",
                "Miller",
                "Davis",
                "Martinez",
                "Lopez",
                "Wilson",
                "Anderson",
            ),
            *("Taylor", "Moore", "Jackson", "Lee", "Harris", "Clark", "Lewis", "Walker", "Young", "Allen", "Wright", "Scott"),
        ),
    ),
    Country(
        *("DE", 0.12, "EUR", 0.92, 2, 1, "49", ("151", "160", "171", "175"), 8, "0"),
        platforms=("zalando",),
        cities=("Berlin", "Hamburg", "München", "Köln", "Leipzig", "Dresden"),
        streets=(
            *("Hauptstraße", "Bahnhofstraße", "Gartenweg", "Schillerstraße", "Goethestraße", "Lindenallee", "Bergstraße"),
            *("Mühlenweg", "Kirchplatz", "Rosenweg", "Schulstraße", "Am Markt"),
        ),
        first_names=(
            *(
                "Lukas",
                "Anna",
                "Jonas",
                "Lea",
                "Felix",
                "Marie",
                "Paul",
                "Sophie",
                "Jürgen",
                "Ursula",
                "Klaus",
                "Heike",
                "Moritz",
            ),
            *("Katrin", "Stefan", "Julia", "Tobias", "Sabine", "Sören", "Greta"),
        ),
        last_names=(
            *("Müller", "Schmidt", "Schneider", "Fischer", "Weber", "Meyer", "Wagner", "Becker", "Schulz", "Hoffmann", "Koch"),
            *("Bauer", "Richter", "Klein", "Wolf", "Schröder", "Neumann", "Schwarz", "Krüger", "Groß"),
        ),
    ),
    Country(
        *("JP", 0.10, "JPY", 150.0, 0, 10, "81", ("90", "80", "70"), 8, "0"),
        platforms=("rakuten",),
        cities=("Tokyo", "Osaka", "Nagoya", "Fukuoka", "Sapporo", "Kobe"),
        streets=("Sakura-dori", "Chuo", "Honcho", "Midorimachi", "Asahimachi", "Higashi", "Nishi", "Minamicho", "Kitamachi"),
        first_names=(
            *(
                "Haruto",
                "Yui",
                "Sota",
                "Aoi",
                "Yuto",
                "Hina",
                "Ren",
                "Sakura",
                "Kenji",
                "Naoko",
                "Takeshi",
                "Emi",
                "Daiki",
                "Mio",
            ),
            *("Hiroshi", "Keiko", "Kaito", "Rin"),
        ),
        last_names=(
            *("Sato", "Suzuki", "Takahashi", "Tanaka", "Watanabe", "Ito", "Yamamoto", "Nakamura", "Kobayashi", "Kato", "Yoshida"),
            *("Yamada", "Sasaki", "Matsumoto", "Inoue", "Kimura", "Hayashi", "Shimizu"),
        ),
    ),
    Country(
        *("SG", 0.06, "SGD", 1.35, 2, 5, "65", ("81", "82", "83", "90", "91"), 6, ""),
        platforms=("shopee", "lazada"),
        cities=("Singapore",),
        streets=("Orchard Road", "Bukit Timah Road", "Tampines Street", "Bedok North", "Clementi Avenue", "Serangoon Road"),
        first_names=("Wei", "Hui", "Jia", "Kumar", "Aisha", "Ming", "Priya", "Daniel", "Grace", "Farid", "Siew", "Ravi"),
        last_names=("Tan", "Lim", "Lee", "Ng", "Wong", "Goh", "Chua", "Nair", "Rahman", "Ong", "Koh", "Pillai"),
    ),
)
BY_CODE: dict[str, Country] = {country.code: country for country in COUNTRIES}
PLATFORM_CODES = {
    "tokopedia": "TP",
    "shopee": "SP",
    "lazada": "LZ",
    "bukalapak": "BL",
    "amazon": "AZ",
    "ebay": "EB",
    "rakuten": "RK",
    "zalando": "ZL",
}
HOME_OF: dict[str, str] = {platform: country.code for country in reversed(COUNTRIES) for platform in country.platforms}
"""The home country of a marketplace. Buyers from other countries write phone numbers with the country code."""
CURRENCIES: dict[str, float] = {country.currency: country.nominal for country in COUNTRIES}


@dataclass(frozen=True)
class Store:
    """A store or warehouse with stock."""

    store_id: str
    name: str
    kind: str
    city: str
    country: str


STORES: tuple[Store, ...] = (
    Store("WH-JKT", "Warehouse Jakarta", "warehouse", "Jakarta", "ID"),
    Store("WH-RNO", "Warehouse Reno", "warehouse", "Reno", "US"),
    Store("WH-LEJ", "Warehouse Leipzig", "warehouse", "Leipzig", "DE"),
    Store("ST-JKT-1", "Jakarta Thamrin", "store", "Jakarta", "ID"),
    Store("ST-SUB-1", "Surabaya Tunjungan", "store", "Surabaya", "ID"),
    Store("ST-BDO-1", "Bandung Dago", "store", "Bandung", "ID"),
    Store("ST-SFO-1", "San Francisco Market Street", "store", "San Francisco", "US"),
    Store("ST-NYC-1", "New York Soho", "store", "New York", "US"),
    Store("ST-BER-1", "Berlin Mitte", "store", "Berlin", "DE"),
    Store("ST-TYO-1", "Tokyo Shibuya", "store", "Tokyo", "JP"),
)
WAREHOUSE_OF = {"ID": 0, "SG": 0, "JP": 0, "US": 1, "DE": 2}
SHOPS_OF: dict[str, tuple[int, ...]] = {
    country.code: tuple(n for n, store in enumerate(STORES) if store.kind == "store" and store.country == country.code)
    for country in COUNTRIES
}
