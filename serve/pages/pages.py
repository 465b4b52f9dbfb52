"""The page at `/`: customers, stock, fraud queue, freshness; made on the server from what the JSON endpoints answer.

It obeys the same keys and scopes. A browser cannot send an Authorization header by itself: signing in puts the key into a cookie
that scripts cannot read and other sites cannot have sent. What somebody looks for travels in the body of a form, never in an
address, which browsers and proxies write down.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from lakehouse.format_bytes import format_bytes
from lakehouse.iceberg.catalog import Lake
from lakehouse.project import Project
from lakehouse.run_history import PastRun, past_runs
from lakehouse.status import TableStatus, statuses
from lakehouse.table import Table
from pipelines.gold.cohort_retention import COHORT_RETENTION
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.gold.dim_products import DIM_PRODUCTS
from pipelines.gold.dim_stores import DIM_STORES, NO_STORE
from pipelines.identity.records import MASTER_PREFIX
from pipelines.privacy.suppression import ERASURES
from pipelines.silver.quarantine import QUARANTINE
from serve.api.customers import LIMIT, AccountVersion, Customer, Customers, Found
from serve.api.fraud import Fraud
from serve.api.inventory import Inventory, LowStock, ProductStock, read_id, read_moment
from serve.http.edges import COOKIE, ApiRequest, Endpoint, Gate, Parameter, authorization
from serve.http.keys import Keys, Scope
from serve.http.problems import Problem, bad_field
from serve.pages import charts, segments
from serve.pages.segments import Cohort, RfmSegments

DIRECTORY = Path(__file__).parent
FORM_BYTES = 4_096
QUEUE = 200
"""Orders of the fraud queue shown at once."""
AT_RISK = 50
COHORTS = 24
"""Cohorts, and months after them, shown at once."""
LOW = 100
RUNS = 10
"""Runs shown at once."""
STATUS_SECONDS = 10.0
"""How long the state of the tables is not asked for again: it asks every source."""
STALE_MS = 10_000
"""From how late a state on the page says that it is late."""
SUGGESTED = 1_000
"""Products that are suggested while somebody types; of a larger catalogue none are."""
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
UP_TO_DATE = ("up to date", "0 changes", "0 messages")
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
COMPARED = ("email", "email_verified", "phone_number", "phone_verified", "name", "address", "city", "country", "loyalty_id")
"""What of an account is compared from version to version."""


@dataclass(frozen=True)
class Asset:
    """A file that pages refer to. Its address holds its digest, so that a browser may keep it for ever."""

    path: str
    content: bytes
    media_type: str


@dataclass(frozen=True)
class AccountChange:
    """A version of an account and what about it differs from the one before; of the first version nothing."""

    version: AccountVersion
    changed: frozenset[str]


@dataclass(frozen=True)
class Condition:
    """How a table is, in a few words; good: nobody has to do anything."""

    text: str
    good: bool


def condition(table: TableStatus) -> Condition:
    """What the status of a table means."""
    if table.table == QUARANTINE.name:  # fed by the steps that read: nothing to be behind of
        return Condition(f"{table.rows:,} rows wait" if table.rows else "empty", not table.rows)
    if table.table == ERASURES.name:  # fed by `erase` alone
        return Condition("up to date" if table.rows else "empty", True)
    if table.last_run is None:
        return Condition("never filled", False)
    return Condition(table.lag, table.lag in UP_TO_DATE)


def quality(table: TableStatus) -> str:
    """The colour of how a table's expectations came out."""
    return "good" if not table.broken else "high" if any(what.startswith("fail") for what in table.broken) else "medium"


def assets(directory: Path) -> dict[str, Asset]:
    """The files of a directory by name."""
    found = {}
    for file in sorted(directory.iterdir()):
        if file.suffix in TYPES:
            content = file.read_bytes()
            name = f"{file.stem}-{hashlib.sha256(content).hexdigest()[:12]}{file.suffix}"
            found[file.name] = Asset(f"/static/{name}", content, TYPES[file.suffix])
    return found


def changes(history: list[AccountVersion]) -> list[AccountChange]:
    """What changed from version to version of each account; the order stays."""
    before: dict[int, AccountVersion] = {}
    found = []
    for version in reversed(history):
        old = before.get(version.user_id)
        differ = [name for name in COMPARED if old is not None and getattr(old, name) != getattr(version, name)]
        found.append(AccountChange(version, frozenset(differ)))
        before[version.user_id] = version
    return found[::-1]


def kinds(text: str) -> tuple[str, ...]:
    """What a text to search for can be, likeliest first."""
    if text.startswith(MASTER_PREFIX):
        return ("master_user_id",)
    if "@" in text:
        return ("email",)
    if re.fullmatch(r"[+(]?[\d\s().\-/]{3,}", text):
        number = ("phone",) if text[0] in "+(" or re.search(r"[\s().\-]", text) else ("order_id", "phone")
        return (*number, "loyalty_id")
    return ("loyalty_id", "order_id", "name") if re.search(r"\d", text) else ("name", "loyalty_id")


def own_path(text: str) -> str:
    """A path of this site, for going there after signing in; anything else: the start."""
    return text if re.fullmatch(r"/(?!/)[\w\-.~:%?=&+/]*", text, re.ASCII) else "/"


class Page:
    """The page and its routes."""

    def __init__(
        self,
        lake: Lake,
        project: Project,
        customers: Customers,
        inventory: Inventory,
        fraud: Fraud,
        gate: Gate,
        asking: Gate,
        keys: Keys,
    ) -> None:
        """`asking` has one thread of its own: a source that does not answer must not hold up look-ups."""
        self.lake, self.project = lake, project
        self.customers, self.inventory, self.fraud = customers, inventory, fraud
        self.gate, self.asking, self.keys = gate, asking, keys
        self.snapshots = customers.snapshots
        self.assets = assets(DIRECTORY / "static")
        self._by_path = {asset.path: asset for asset in self.assets.values()}
        self._statuses: tuple[float, tuple[datetime, list[TableStatus], list[PastRun]]] | None = None
        self._kept: dict[str, tuple[int | None, pl.DataFrame]] = {}
        self._templates = Environment(
            loader=FileSystemLoader(DIRECTORY), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.filters |= {
            "ago": ago,
            "breakable": breakable,
            "condition": condition,
            "count": count,
            "day": day,
            "moment": in_words,
            "money": money,
            "number": number,
            "path": lambda text: quote(text, safe=":"),
            "percent": percent,
            "quality": quality,
            "size": format_bytes,
        }
        self._templates.globals |= {
            "assets": {name.replace(".", "_"): asset.path for name, asset in self.assets.items()},
            "charts": charts,
            "segments": segments,
            "currency": customers.currency,
            "quarantine": QUARANTINE.name,
            "stale_ms": STALE_MS,
        }

    # what is shown

    async def overview(self, asked: ApiRequest) -> Response:
        """GET /"""
        return self._shown(asked, "customers.html", "customers", **await self.gate.run(self._spread))

    async def search(self, asked: ApiRequest) -> Response:
        """POST /customers: a person's page when it is one; who it could be when there are several."""
        form = await _form(asked.request)
        text = form.get("q", "").strip()
        told = await self.gate.run(self._found, text)
        if isinstance(told, str):
            return RedirectResponse(f"/customers/{quote(told, safe=':')}", 303, HEADERS)
        return self._shown(asked, "customers.html", "customers", **told)

    async def of_order(self, asked: ApiRequest) -> Response:
        """GET /orders/{order_id}: the page of whoever placed it."""
        order = asked.path["order_id"]
        try:
            customer: Customer = await self.gate.run(self.customers.shown_by, {"order_id": order}, 1)
        except Problem as problem:
            if problem.status != 404:
                raise
            detail = f"{problem.detail} An order scored at the checkout comes into the lakehouse with its next run."
            raise Problem(404, detail) from None
        return RedirectResponse(f"/customers/{quote(customer.master_user_id, safe=':')}", 303, HEADERS)

    async def customer(self, asked: ApiRequest) -> Response:
        """GET /customers/{master_user_id}"""
        return await self.gate.run(self._customer, asked)

    async def stock(self, asked: ApiRequest) -> Response:
        """GET /stock"""
        query = {name: value for name, value in asked.query.items() if value}
        wanted = replace(asked, query=query | {"limit": LOW})
        product, store = query.get("product_id"), query.get("store_id")
        of: ProductStock | None = None
        low: LowStock | None = None
        problem = None
        if product:
            try:
                of = await self.inventory.stock_of(product, replace(asked, query=query))
            except Problem as error:
                if error.status != 404:
                    raise
                problem = error.detail
        else:
            low = await self.inventory.low(wanted)
        names = await self.gate.run(self._names)
        return self._shown(
            asked, "stock.html", "stock", 404 if problem else 200, product=product, store=store, moment=query.get("as_of"),
            of=of, low=low, problem=problem, days=self.inventory.days, **names,
        )  # fmt: skip

    async def queue(self, asked: ApiRequest) -> Response:
        """GET /fraud"""
        return await self.gate.run(self._queue, asked)

    async def freshness(self, asked: ApiRequest) -> Response:
        """GET /freshness"""
        at, tables, runs = await self.asking.run(self._tables)
        basis, waiting = None, None
        try:
            basis = self.inventory.basis(await self.inventory.line(asked))
        except Problem as problem:
            waiting = problem.detail
        return self._shown(asked, "freshness.html", "freshness", at=at, tables=tables, runs=runs, basis=basis, waiting=waiting)

    async def sign_in(self, asked: ApiRequest) -> Response:
        """POST /sign-in: the key goes into a cookie."""
        form = await _form(asked.request)
        key, to = form.get("key", "").strip(), own_path(form.get("next", "/"))
        try:
            if self.keys.keys:
                self.keys.check(f"Bearer {key}", None)
        except Problem:
            return self._problem(asked.request, Problem(401, "This key is not known here. Was it copied whole?"), to)
        response = RedirectResponse(to, 303, HEADERS)
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=asked.request.url.scheme == "https")
        return response

    async def sign_out(self, asked: ApiRequest) -> Response:
        """POST /sign-out: the cookie is taken back."""
        response = RedirectResponse("/", 303, HEADERS)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    async def static(self, asked: ApiRequest) -> Response:
        """GET /static/{name}"""
        asset = self._by_path.get(f"/static/{asked.path['name']}")
        if asset is None:
            raise Problem(404, "There is no such file.")
        headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
        return Response(asset.content, 200, headers, asset.media_type)

    def problem(self, request: Request, problem: Problem) -> Response:
        """A problem as a page that says what to do."""
        return self._problem(request, problem, request.url.path if request.method == "GET" else "/")

    # how it is put together

    def _spread(self) -> dict[str, Any]:
        people = self._all(CUSTOMER_360, segments.RFM_READS)
        retention = self._all(COHORT_RETENTION, segments.RETENTION_READS)
        spread: RfmSegments = segments.rfm(people, datetime.now(UTC))
        cohorts: list[Cohort] = segments.cohorts(retention)
        return {
            "q": "",
            "searched": False,
            "wrong": None,
            "rfm": spread,
            "cohorts": cohorts[:COHORTS],
            "all_cohorts": len(cohorts),
            "shown": COHORTS,
            "changed": self.snapshots.of(CUSTOMER_360).at,
        }

    def _all(self, table: Table, columns: tuple[str, ...]) -> pl.DataFrame:
        """A whole table, read again when there is a newer snapshot. Always the same columns of a table."""
        newest = self.snapshots.of(table)
        kept = self._kept.get(table.name)
        if kept is None or kept[0] != newest.snapshot_id:
            self._kept[table.name] = kept = (newest.snapshot_id, newest.read(columns=columns))
        return kept[1]

    def _found(self, text: str) -> str | dict[str, Any]:
        """The name of the person searched for, or what to show."""
        told: dict[str, Any] = {"q": text, "searched": True, "people": [], "total": 0, "wrong": None}
        if not text:
            return told | {"wrong": "Type something to look for first."}
        people: dict[str, Found] = {}
        total = 0
        for kind in kinds(text[:200]):
            try:
                if kind == "master_user_id":
                    return self.customers.named(text, 1).master_user_id
                if kind != "name":
                    return self.customers.shown_by({kind: text}, 1).master_user_id
                found, many = self.customers.called(text)
            except Problem as problem:
                if problem.status == 409:
                    found, many = self.customers.showing({kind: text})
                elif problem.status in (400, 404):
                    continue
                else:
                    raise
            people |= {one.master_user_id: one for one in found}
            total = max(total, many)
        if len(people) == 1:
            return next(iter(people))
        return told | {"people": list(people.values()), "total": max(total, len(people))}

    def _customer(self, asked: ApiRequest) -> Response:
        limit = asked.query.get("limit", 100)
        one = self.customers.named(asked.path["master_user_id"], limit)
        every = charts.groups(one.links)
        some = charts.drawn(every)
        recency = one.rfm.recency_days
        return self._shown(
            asked, "customer.html", "customers", one=one, changes=changes(one.history), groups=some, left=len(every) - len(some),
            rfm=segments.rfm(self._all(CUSTOMER_360, segments.RFM_READS), datetime.now(UTC)),
            band=segments.recency_band(recency) if recency is not None else None, limit=limit,
        )  # fmt: skip

    def _queue(self, asked: ApiRequest) -> Response:
        scored = self.fraud.answers()
        waiting = [found for found in scored if found[1].decision != "approve"]
        waiting.sort(key=lambda found: (-found[1].score, found[0]))
        models = self.fraud.watch.current
        personal = self._opens(asked.request, "customers")
        risks, many = self.customers.at_risk(AT_RISK) if personal else ([], 0)
        return self._shown(
            asked, "fraud.html", "fraud", queue=waiting[:QUEUE], waiting=len(waiting), scored=len(scored),
            decisions=Counter(found[1].decision for found in scored), champion=models.champion, challenger=models.challenger,
            failure=self.fraud.watch.error, minutes=self.fraud.serving.same_answer_seconds / 60, risks=risks, many=many,
            personal=personal, model=self.fraud.watch.registry.name,
        )  # fmt: skip

    def _names(self) -> dict[str, Any]:
        stores = (
            self._all(DIM_STORES, ("store_id", "name", "city")).filter(pl.col("store_id") != NO_STORE).sort("store_id").to_dicts()
        )
        products = self._all(DIM_PRODUCTS, ("product_id", "name"))
        return {"stores": stores, "names": dict(products.iter_rows()), "suggested": SUGGESTED}

    def _tables(self) -> tuple[datetime, list[TableStatus], list[PastRun]]:
        kept = self._statuses
        if kept is None or time.monotonic() - kept[0] > STATUS_SECONDS:
            told = (datetime.now(UTC), statuses(self.lake, self.project), past_runs(self.lake, RUNS))
            self._statuses = kept = (time.monotonic(), told)
        return kept[1]

    def _opens(self, request: Request, scope: Scope) -> bool:
        """Whether this request's key opens something."""
        try:
            if self.keys.keys:
                self.keys.check(authorization(request, True), scope)
        except Problem:
            return False
        return True

    def _shown(self, asked: ApiRequest, template: str, tab: str, status: int = 200, **told: Any) -> Response:
        return self._made(asked.request, template, tab, status, {}, **told)

    def _made(self, request: Request, template: str, tab: str, status: int, headers: Mapping[str, str], **told: Any) -> Response:
        signed = bool(self.keys.keys) and COOKIE in request.cookies
        html = self._templates.get_template(template).render(tab=tab, signed=signed, now=datetime.now(UTC), **told)
        return Response(html, status, {**HEADERS, **headers}, "text/html; charset=utf-8")

    def _problem(self, request: Request, problem: Problem, to: str) -> Response:
        tab = next((name for name in ("stock", "fraud", "freshness") if request.url.path.startswith(f"/{name}")), "customers")
        return self._made(
            request, "problem.html", tab, problem.status, problem.headers, problem=problem, to=own_path(to),
            keyed=bool(self.keys.keys),
            people=[wrong.detail for wrong in problem.errors if wrong.field == "master_user_id"],
        )  # fmt: skip

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Its routes. They are not in /openapi.json: they answer people."""
        store = Parameter("store_id", "Only this store.", _empty_or(read_id))
        product = Parameter("product_id", "This product in all stores.", _empty_or(read_id))
        moment = Parameter("as_of", "Stock at this moment (UTC).", _empty_or(read_moment))
        return (
            self._endpoint("GET", "/", self.overview, "customers"),
            self._endpoint("POST", "/customers", self.search, "customers"),
            self._endpoint("GET", "/customers/{master_user_id}", self.customer, "customers", (LIMIT,)),
            self._endpoint("GET", "/orders/{order_id}", self.of_order, "customers"),
            self._endpoint("GET", "/stock", self.stock, "inventory", (product, store, moment)),
            self._endpoint("GET", "/fraud", self.queue, "score"),
            self._endpoint("GET", "/freshness", self.freshness, None, keyed=True),
            self._endpoint("POST", "/sign-in", self.sign_in, None),
            self._endpoint("POST", "/sign-out", self.sign_out, None),
            self._endpoint("GET", "/static/{name}", self.static, None),
        )

    def _endpoint(
        self, method: str, path: str, handler: Callable[[ApiRequest], Awaitable[Response]], scope: Scope | None,
        parameters: tuple[Parameter, ...] = (), keyed: bool = False,
    ) -> Endpoint:  # fmt: skip
        name, doc = f"page_{handler.__name__}", (handler.__doc__ or "").strip()
        return Endpoint(
            method, path, name, doc, handler, str, scope, parameters,
            media_type="text/html", keyed=keyed, browser=True, problem=self.problem,
        )  # fmt: skip


def _empty_or(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A field of a form that was left empty is none."""
    return lambda text: read(text) if text.strip() else None


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form. Raises Problem 400, 403, 413, 415."""
    # a page elsewhere must not sign somebody in here
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Problem(403, "This form was sent from another site.")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Problem(415, "The body must be a form.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_BYTES:
            raise Problem(413, f"That is longer than {FORM_BYTES} bytes.")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=10))
    except ValueError:
        raise bad_field("body", "is no form in UTF-8") from None


def in_words(moment: datetime | None) -> str:
    """'31 Jan 2026, 14:56'."""
    return "–" if moment is None else f"{moment.astimezone(UTC):%d %b %Y, %H:%M}".lstrip("0")


def day(moment: datetime | date | None) -> str:
    """'31 Jan 2026'."""
    return "–" if moment is None else f"{moment:%d %b %Y}".lstrip("0")


def number(value: float | None, digits: int = 0) -> str:
    """'12,345.6'."""
    return "–" if value is None else f"{value:,.{digits}f}"


def count(many: int, what: str) -> str:
    """'1 order', '1,234 orders'."""
    return f"{many:,} {what}{'' if many == 1 else 's'}"


def money(value: Decimal | None, currency: str | None = None) -> str:
    """'1,249.90 USD'."""
    return "–" if value is None else f"{value:,.2f}{' ' + currency if currency else ''}"


def percent(value: float | None) -> str:
    """'12%'."""
    return "–" if value is None else f"{value:.0%}"


def breakable(name: str) -> Markup:
    """A name of a table or feature that may go on in the next line after a dot or underscore."""
    return Markup(re.sub(r"(?<=[._])(?=[^._])", "<wbr>", str(escape(name))))


def ago(moment: datetime | None, now: datetime) -> str:
    """'3 min ago'."""
    if moment is None:
        return "never"
    seconds = max(0, int((now - moment).total_seconds()))
    for length, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length:,} {unit} ago"
    return f"{seconds} s ago"
