"""The description at /openapi.json, made from the endpoints themselves."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from serve.http.edges import Endpoint
from serve.http.keys import SCOPES
from serve.http.problems import Wrong

REFERENCE = "#/components/schemas/{name}"


class ProblemDocument(msgspec.Struct, frozen=True):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[Wrong] = []


def describe(endpoints: Iterable[Endpoint], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    every = list(endpoints)
    types = [kind for one in every for kind in (one.body, one.answer) if kind is not None and kind is not str]
    _, schemas = msgspec.json.schema_components([*types, ProblemDocument], ref_template=REFERENCE)
    paths: dict[str, Any] = {}
    for one in every:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ShopSphere",
            "version": version,
            "description": "Stock, customers and fraud scores, each with what it is based on.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": f"An API key with the scope of the endpoint: {', '.join(SCOPES)}. "
                    "A server on loopback without keys asks for none.",
                }
            },
        },
    }


def _operation(one: Endpoint) -> dict[str, Any]:
    statuses = {400, *one.statuses} if one.parameters or one.body else set(one.statuses)
    statuses |= {401, 403} if one.scope else set()
    statuses |= {413, 415} if one.body else set()
    content: dict[str, Any] = {"schema": _schema(one.answer) if one.media_type == "application/json" else {"type": "string"}}
    if one.answer_example is not None:
        content["example"] = msgspec.to_builtins(one.answer_example, str_keys=True)
    operation: dict[str, Any] = {
        "operationId": one.name,
        "summary": one.doc,
        "responses": {"200": {"description": "The answer", "content": {one.media_type: content}}}
        | {str(status): _problem(status) for status in sorted(statuses)},
    }
    inside = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1, "maxLength": 200},
            "example": example,
        }
        for name, example in one.path_example.items()
    ]
    query = [
        {"name": p.name, "in": "query", "required": False, "description": p.doc, "schema": p.schema}
        | ({"example": p.example} if p.example is not None else {})
        for p in one.parameters
    ]
    if inside or query:
        operation["parameters"] = [*inside, *query]
    if one.body is not None:
        body: dict[str, Any] = {"schema": _schema(one.body)}
        if one.body_example is not None:
            body["example"] = msgspec.to_builtins(one.body_example, str_keys=True)
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    if one.scope is not None:
        operation["security"] = [{"key": []}, {}]
        operation["tags"] = [one.scope]
    return operation


def _schema(kind: type) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REFERENCE)
    return schema


def _problem(status: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "description": HTTPStatus(status).phrase,
        "content": {"application/problem+json": {"schema": {"$ref": REFERENCE.format(name="ProblemDocument")}}},
    }
    if status in (429, 503):
        told["headers"] = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
    return told
