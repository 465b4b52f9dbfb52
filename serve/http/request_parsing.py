"""Validation of queries and JSON bodies. Invalid input raises a Problem that names the field."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request

from serve.http.endpoints import Parameter
from serve.http.problems import Problem, bad_body, bad_field

BODY_SECONDS = 30.0
"""How long a body may take to arrive, however steadily it does."""


def read_query(request: Request, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return the values of the query parameters by name. Raises Problem 400."""
    values: dict[str, Any] = {}
    if not request.scope["query_string"]:
        return values
    for name, text in request.query_params.multi_items():
        parameter = parameters.get(name)
        if parameter is None:
            raise bad_field("query", f"contains an unknown parameter, expected: {', '.join(parameters) or 'none'}")
        if name in values:
            raise bad_field(name, "is given more than once")
        try:
            values[name] = parameter.read(text)
        except ValueError as error:
            raise bad_field(name, str(error)) from None
    return values


async def read_body(request: Request, decoder: msgspec.json.Decoder[Any], limit: int) -> Any:
    """Return the decoded JSON body of at most `limit` bytes. Raises Problem 400, 408, 413 or 415."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(415, "The body must be JSON. Send the header Content-Type: application/json.")
    length = request.headers.get("content-length", "")
    body = bytearray()
    if length.isdigit() and int(length) > limit:
        raise Problem(413, f"The body is larger than {limit} bytes.")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise Problem(413, f"The body is larger than {limit} bytes.")
    except TimeoutError:
        raise Problem(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.") from None
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if "got `float`" in str(error):
            return _decode_integral_floats(body, decoder.type)
        raise bad_body(error) from None
    except RecursionError:
        raise bad_field("body", "is nested too deeply") from None


def _decode_integral_floats(body: bytes | bytearray, expected: Any) -> Any:
    """Decode a body in which integers are written as 1.0, which JSON does not distinguish from 1. Raises Problem 400."""

    def integral(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: integral(item) for name, item in value.items()}
        if isinstance(value, list):
            return [integral(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    try:
        return msgspec.convert(integral(msgspec.json.decode(body)), expected)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_body(error) from None
    except RecursionError:
        raise bad_field("body", "is nested too deeply") from None
