"""Requests that a page of another site makes a browser send: refused where they could change something."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import Request

from serve.http.problems import Problem

OWN_SITE = ("same-origin", "none")
"""Values of Sec-Fetch-Site for a page of this server, and for a request that no page made."""


def refuse_cross_site(request: Request) -> None:
    """Raise Problem 403 when a browser says that another site's page made the request (OWASP ASVS 4.0.3, 4.2.2).

    Clients that are not browsers send neither header.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        if site not in OWN_SITE:
            raise Problem(403, "The request was made by a page of another site.")
        return
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        raise Problem(403, "The request was made by a page of another site.")
