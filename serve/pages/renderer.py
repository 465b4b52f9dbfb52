"""Rendering of pages from templates, with the headers that restrict what a page may load and do."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from lakehouse.format_bytes import format_bytes
from pipelines.silver.quarantine import QUARANTINE
from serve.http.endpoints import ApiRequest
from serve.http.keys import Keys
from serve.http.problems import Problem
from serve.http.sessions import COOKIE
from serve.pages import charts, segments
from serve.pages.assets import DIRECTORY, Asset
from serve.pages.formatting import (
    format_age,
    format_count,
    format_day,
    format_moment,
    format_money,
    format_number,
    format_percent,
    insert_line_breaks,
)
from serve.pages.local_path import local_path
from serve.pages.table_condition import condition, severity

STALE_MS = 10_000
"""Staleness from which on a page warns that it may be out of date."""
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
TABS = ("stock", "fraud", "freshness")


def redirect(path: str) -> RedirectResponse:
    """Return a redirect (303) to a path of this site."""
    return RedirectResponse(path, 303, HEADERS)


def customer_path(master_user_id: str) -> str:
    """Return the path of a customer's page."""
    return f"/customers/{quote(master_user_id, safe=':')}"


class Renderer:
    """Renders templates."""

    def __init__(self, assets: Mapping[str, Asset], currency: str, keys: Keys) -> None:
        self.keys = keys
        self._templates = Environment(
            loader=FileSystemLoader(DIRECTORY / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "age": format_age,
            "condition": condition,
            "count": format_count,
            "day": format_day,
            "line_breaks": insert_line_breaks,
            "moment": format_moment,
            "money": format_money,
            "number": format_number,
            "path": lambda text: quote(text, safe=":"),
            "percent": format_percent,
            "severity": severity,
            "size": format_bytes,
        }
        self._templates.globals |= {
            "assets": {name.replace(".", "_"): asset.path for name, asset in assets.items()},
            "charts": charts,
            "segments": segments,
            "currency": currency,
            "quarantine": QUARANTINE.name,
            "stale_ms": STALE_MS,
        }

    def page(self, request: ApiRequest, template: str, tab: str, status: int = 200, **context: Any) -> Response:
        """Return a page. tab: the section that the navigation marks as current."""
        return self._render(request.http, template, tab, status, {}, context)

    def problem(self, request: Request, problem: Problem) -> Response:
        """Return a page about a problem, from which a user can sign in or retry."""
        return self.problem_page(request, problem, request.url.path if request.method == "GET" else "/")

    def problem_page(self, request: Request, problem: Problem, path: str) -> Response:
        """Return a page about a problem. path: where to go after signing in or to retry."""
        tab = next((name for name in TABS if request.url.path.startswith(f"/{name}")), "customers")
        context = {
            "problem": problem,
            "path": local_path(path),
            "keyed": self.keys.required,
            "masters": [error.detail for error in problem.errors if error.field == "master_user_id"],
        }
        return self._render(request, "problem.html", tab, problem.status, problem.headers, context)

    def _render(
        self, request: Request, template: str, tab: str, status: int, headers: Mapping[str, str], context: Mapping[str, Any]
    ) -> Response:
        signed_in = self.keys.required and COOKIE in request.cookies
        html = self._templates.get_template(template).render(tab=tab, signed_in=signed_in, now=datetime.now(UTC), **context)
        return Response(html, status, {**HEADERS, **headers}, "text/html; charset=utf-8")
