"""The home page, customer search and customer pages.

Search terms travel in the body of a form, never in a URL, which browsers and proxies record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from pipelines.gold.cohort_retention import COHORT_RETENTION
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.identity.records import MASTER_PREFIX
from serve.api.customers import AccountVersion, Customer, CustomerMatch, Customers
from serve.http.endpoints import ApiRequest
from serve.http.problems import Problem
from serve.pages import charts, segments
from serve.pages.forms import read_form
from serve.pages.renderer import Renderer, customer_path, redirect
from serve.pages.table_frames import TableFrames

MAX_COHORTS = 24
"""Cohorts, and months after the first purchase, on the home page."""
MAX_SEARCH_LENGTH = 200
COMPARED_FIELDS = (
    "email",
    "email_verified",
    "phone_number",
    "phone_verified",
    "name",
    "address",
    "city",
    "country",
    "loyalty_id",
)
"""Fields whose changes are marked in the account history."""


@dataclass(frozen=True)
class AccountChange:
    """A version of an account, and the fields that differ from the previous one; none for the first version."""

    version: AccountVersion
    changed: frozenset[str]


def account_changes(history: list[AccountVersion]) -> list[AccountChange]:
    """Return the versions with their changes, in the given order (newest first)."""
    previous: dict[int, AccountVersion] = {}
    changes = []
    for version in reversed(history):
        before = previous.get(version.user_id)
        changed = [name for name in COMPARED_FIELDS if before is not None and getattr(before, name) != getattr(version, name)]
        changes.append(AccountChange(version, frozenset(changed)))
        previous[version.user_id] = version
    return changes[::-1]


def identifier_kinds(text: str) -> tuple[str, ...]:
    """Return the kinds of identifier that a search term may be, most likely first."""
    if text.startswith(MASTER_PREFIX):
        return ("master_user_id",)
    if "@" in text:
        return ("email",)
    if re.fullmatch(r"[+(]?[\d\s().\-/]{3,}", text):
        kinds = ("phone",) if text[0] in "+(" or re.search(r"[\s().\-]", text) else ("order_id", "phone")
        return (*kinds, "loyalty_id")
    return ("loyalty_id", "order_id", "name") if re.search(r"\d", text) else ("name", "loyalty_id")


class CustomerPages:
    """Pages about customers."""

    def __init__(self, customers: Customers, frames: TableFrames, renderer: Renderer) -> None:
        self.customers, self.frames, self.renderer = customers, frames, renderer
        self.pool = customers.pool

    async def overview(self, request: ApiRequest) -> Response:
        """Show all customers: RFM grids and cohorts."""
        context = await self.pool.run(self._distributions)
        return self.renderer.page(request, "customers.html", "customers", **context)

    async def search(self, request: ApiRequest) -> Response:
        """Redirect to the customer who matches, or list several."""
        form = await read_form(request.http)
        text = form.get("q", "").strip()
        if not text:
            return self._results(request, text, error="Enter a search term first.")
        people, total = await self.pool.run(self._search, text)
        if len(people) == 1:
            return redirect(customer_path(next(iter(people))))
        return self._results(request, text, list(people.values()), total)

    def _results(
        self,
        request: ApiRequest,
        text: str,
        people: Sequence[CustomerMatch | None] = (),
        total: int = 0,
        error: str | None = None,
    ) -> Response:
        return self.renderer.page(
            request, "customers.html", "customers", q=text, searched=True, people=people, total=total, error=error
        )

    async def of_order(self, request: ApiRequest) -> Response:
        """Redirect to the customer who placed an order."""
        order = request.path["order_id"]
        try:
            customer: Customer = await self.pool.run(self.customers.find_by_identifiers, {"order_id": order}, 1)
        except Problem as problem:
            if problem.status != 404:
                raise
            detail = f"{problem.detail} An order scored at the checkout reaches the lakehouse with its next run."
            raise Problem(404, detail) from None
        return redirect(customer_path(customer.master_user_id))

    async def customer(self, request: ApiRequest) -> Response:
        """Show a customer."""
        return await self.pool.run(self._customer, request)

    def _distributions(self) -> dict[str, Any]:
        people = self.frames.read(CUSTOMER_360, segments.RFM_READS)
        retention = self.frames.read(COHORT_RETENTION, segments.RETENTION_READS)
        rfm = segments.rfm(people, datetime.now(UTC))
        cohorts = segments.cohorts(retention)
        return {
            "q": "",
            "searched": False,
            "error": None,
            "rfm": rfm,
            "cohorts": cohorts[:MAX_COHORTS],
            "total_cohorts": len(cohorts),
            "max_months": MAX_COHORTS,
            "committed_at": self.customers.tables.get(CUSTOMER_360).committed_at,
        }

    def _search(self, text: str) -> tuple[dict[str, CustomerMatch | None], int]:
        """Return matches by master_user_id, at most MAX_LISTED per kind of identifier, and the total number.

        An identifier of one person ends the search.
        """
        people: dict[str, CustomerMatch | None] = {}
        total = 0
        for kind in identifier_kinds(text[:MAX_SEARCH_LENGTH]):
            try:
                if kind == "master_user_id":
                    return {self.customers.find_by_master(text, 1).master_user_id: None}, 1
                if kind != "name":
                    return {self.customers.find_by_identifiers({kind: text}, 1).master_user_id: None}, 1
                found, number = self.customers.search_by_name(text)
            except Problem as problem:
                if problem.status == 409:
                    found, number = self.customers.list_by_identifiers({kind: text})
                elif problem.status in (400, 404):
                    continue
                else:
                    raise
            people |= {person.master_user_id: person for person in found}
            total = max(total, number)
        return people, max(total, len(people))

    def _customer(self, request: ApiRequest) -> Response:
        limit = request.query.get("limit", 100)
        customer = self.customers.find_by_master(request.path["master_user_id"], limit)
        groups = charts.group_records(customer.links)
        drawn = charts.drawable(groups)
        recency = customer.rfm.recency_days
        return self.renderer.page(
            request,
            "customer.html",
            "customers",
            customer=customer,
            changes=account_changes(customer.history),
            groups=drawn,
            omitted_groups=len(groups) - len(drawn),
            rfm=segments.rfm(self.frames.read(CUSTOMER_360, segments.RFM_READS), datetime.now(UTC)),
            recency_band=segments.recency_band(recency) if recency is not None else None,
            limit=limit,
        )
