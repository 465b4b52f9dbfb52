"""The OpenAPI document at /openapi.json, generated from the endpoints."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from serve.http.endpoints import Endpoint
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
    """Return the OpenAPI 3.1 document of these endpoints."""
    every = list(endpoints)
    types = [kind for one in every for kind in (one.body, one.answer) if kind is not None and kind is not str]
    _, schemas = msgspec.json.schema_components([*types, ProblemDocument], ref_template=REFERENCE)
    paths: dict[str, Any] = {}
    for endpoint in every:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ShopSphere",
            "version": version,
            "description": "Inventory, customers and fraud scores, each with the data it is based on.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": f"An API key with the scope of the endpoint: {', '.join(SCOPES)}. "
                    "A server on loopback without keys requires none.",
                }
            },
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {
        "schema": _schema(endpoint.answer) if endpoint.media_type == "application/json" else {"type": "string"}
    }
    if endpoint.answer_example is not None:
        content["example"] = msgspec.to_builtins(endpoint.answer_example, str_keys=True)
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.doc,
        "responses": {"200": {"description": "Success", "content": {endpoint.media_type: content}}}
        | {str(status): _problem(status) for status in sorted(_error_statuses(endpoint))},
    }
    if parameters := [*_path_parameters(endpoint), *_query_parameters(endpoint)]:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        body: dict[str, Any] = {"schema": _schema(endpoint.body)}
        if endpoint.body_example is not None:
            body["example"] = msgspec.to_builtins(endpoint.body_example, str_keys=True)
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    if endpoint.scope is not None:
        operation["security"] = [{"key": []}, {}]
        operation["tags"] = [endpoint.scope]
    return operation


def _error_statuses(endpoint: Endpoint) -> set[int]:
    statuses = {400, *endpoint.statuses} if endpoint.parameters or endpoint.body else set(endpoint.statuses)
    statuses |= {401, 403} if endpoint.scope or endpoint.any_key else set()
    statuses |= {403, 408, 413, 415} if endpoint.body else set()
    return statuses


def _path_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    schema = {"type": "string", "minLength": 1, "maxLength": 200}
    return [
        {"name": name, "in": "path", "required": True, "schema": schema, "example": example}
        for name, example in endpoint.path_example.items()
    ]


def _query_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "in": "query", "required": False, "description": one.doc, "schema": one.schema}
        | ({"example": one.example} if one.example is not None else {})
        for one in endpoint.parameters
    ]


def _schema(kind: type) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REFERENCE)
    return schema


def _problem(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": HTTPStatus(status).phrase,
        "content": {"application/problem+json": {"schema": {"$ref": REFERENCE.format(name="ProblemDocument")}}},
    }
    if status in (429, 503):
        response["headers"] = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
    return response
