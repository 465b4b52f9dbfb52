"""Signing in and out.

A browser cannot send an Authorization header by itself, so the API key is stored in a cookie that scripts cannot read and other
sites cannot send.
"""

from __future__ import annotations

from starlette.responses import Response

from serve.http.authentication import COOKIE
from serve.http.endpoints import ApiRequest
from serve.http.keys import Keys
from serve.http.problems import Problem
from serve.pages.forms import read_form
from serve.pages.local_path import local_path
from serve.pages.renderer import Renderer, redirect


class SignIn:
    """The forms to sign in and out."""

    def __init__(self, keys: Keys, renderer: Renderer) -> None:
        self.keys, self.renderer = keys, renderer

    async def sign_in(self, request: ApiRequest) -> Response:
        """Set the cookie with the key from the form."""
        form = await read_form(request.http)
        key, path = form.get("key", "").strip(), local_path(form.get("next", "/"))
        try:
            if self.keys.keys:
                self.keys.check(f"Bearer {key}", None)
        except Problem:
            problem = Problem(401, "This API key is not valid. Check that you copied all of it.")
            return self.renderer.problem_page(request.http, problem, path)
        response = redirect(path)
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=request.http.url.scheme == "https")
        return response

    async def sign_out(self, request: ApiRequest) -> Response:
        """Delete the cookie."""
        response = redirect("/")
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response
