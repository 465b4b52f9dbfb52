"""Authentication of requests: an API key with the endpoint's scope, or, without any keys, local requests only."""

from __future__ import annotations

import functools
import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from serve.http.endpoints import Endpoint
from serve.http.keys import Keys, KeyScope
from serve.http.problems import Problem
from serve.http.sessions import COOKIE

MAX_ADDRESS = 45
"""Characters of an IPv6 address."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def authenticate(request: Request, endpoint: Endpoint, keys: Keys) -> str:
    """Return the name of the request's API key, empty when none is required. Raises Problem 401 or 403."""
    if endpoint.scope is None and not endpoint.any_key:
        return ""
    if keys.required:
        return _check(request, endpoint.scope, keys, cookie_auth=endpoint.cookie_auth)
    # replicas listen on their own ports: without keys, those must not accept remote clients either
    client = request.scope.get("client")
    if client is not None and not _is_loopback(client[0]):
        raise Problem(403, "No API keys are configured, so only requests from this machine are accepted.")
    # DNS rebinding: a web page could resolve its own host name to this machine, and the browser would let it in
    if not _is_local_host(request.headers.get("host", "")):
        raise Problem(403, "No API keys are configured, so only http://localhost and http://127.0.0.1 are accepted.")
    return ""


def _check(request: Request, scope: KeyScope | None, keys: Keys, *, cookie_auth: bool) -> str:
    """Check the Authorization header; with `cookie_auth` and without it the session, since browsers cannot set the header."""
    header = request.headers.get("authorization", "")
    if not header and cookie_auth and COOKIE in request.cookies:
        return keys.check_session(request.cookies[COOKIE], scope)
    return keys.check(header, scope)


def client_address(request: Request) -> str:
    """Return the address that a request came from. HAProxy on this machine appends the one that it saw to X-Forwarded-For."""
    client = request.scope.get("client")
    address = str(client[0]) if client else ""
    if _is_loopback(address) and (forwarded := request.headers.getlist("x-forwarded-for")):
        return forwarded[-1].rpartition(",")[2].strip()[:MAX_ADDRESS]
    return address


def has_scope(request: Request, scope: KeyScope, keys: Keys) -> bool:
    """Return whether the request's API key has a scope; without any keys, every request has all scopes."""
    try:
        if keys.required:
            _check(request, scope, keys, cookie_auth=True)
    except Problem:
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _is_local_host(host: str) -> bool:
    try:
        return not host or (urlsplit(f"//{host}").hostname or "") in LOCAL_HOSTS
    except ValueError:  # unbalanced brackets
        return False


@functools.lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
