"""Signing in and out.

A browser cannot send an Authorization header by itself, so it gets a session in a cookie that scripts cannot read and other
sites cannot send. The API key is not stored in the browser.
"""

from __future__ import annotations

from starlette.responses import Response

from serve.http.endpoints import ApiRequest
from serve.http.keys import Keys
from serve.http.problems import Problem
from serve.http.sessions import COOKIE, LIFETIME_SECONDS
from serve.pages.forms import read_form
from serve.pages.local_path import local_path
from serve.pages.renderer import Renderer, redirect


class SignIn:
    """The forms to sign in and out."""

    def __init__(self, keys: Keys, renderer: Renderer) -> None:
        self.keys, self.renderer = keys, renderer

    async def sign_in(self, request: ApiRequest) -> Response:
        """Start a session with the key from the form."""
        form = await read_form(request.http)
        key, path = form.get("key", "").strip(), local_path(form.get("next", "/"))
        session = self.keys.start_session(key) if self.keys.required else ""
        if session is None:
            problem = Problem(401, "This API key is not valid. Check that you copied all of it.")
            return self.renderer.problem_page(request.http, problem, path)
        response = redirect(path)
        response.set_cookie(
            COOKIE,
            session,
            max_age=LIFETIME_SECONDS,
            httponly=True,
            samesite="strict",
            secure="https" in (request.http.url.scheme, request.http.headers.get("x-forwarded-proto")),
        )
        return response

    async def sign_out(self, request: ApiRequest) -> Response:
        """End the session and delete the cookie."""
        if session := request.http.cookies.get(COOKIE):
            self.keys.ended.add(session)
        response = redirect("/")
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response
