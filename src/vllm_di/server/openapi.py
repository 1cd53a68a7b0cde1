"""``openapi.json``, from the types of requests and answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from vllm_di.components.messages import RANGES
from vllm_di.server.answers import AnthropicError, Error
from vllm_di.server.auth import OPEN_PATHS
from vllm_di.server.operations import Operation
from vllm_di.server.protocol import EXACT, REFUSED, PoolingRequest
from vllm_di.version import __version__

_REF = "#/components/schemas/{name}"
_STATUSES = {
    400: "The request is wrong: `error.param` names the field, `error.code` the kind.",
    401: "A valid API key is needed.",
    404: "The model, or what the path names, is not here.",
    408: "The body arrived too slowly.",
    413: "The body is too long.",
    415: "The body is not JSON, or is compressed.",
    421: "The host name is not accepted.",
    429: "The queue is full: `Retry-After` says for how long.",
    431: "The head of the request is too long.",
    503: "The engine starts, is dead, or the server stops.",
}
_ALWAYS, _WITH_BODY = (401, 421, 431), (400, 404, 408, 413, 415, 429, 503)


def openapi(operations: Sequence[Operation]) -> dict[str, Any]:
    """OpenAPI 3.1. Fields that are known and refused are left out."""
    kinds = [kind for one in operations for kind in (one.body, one.answer) if kind is not None]
    kinds = list(dict.fromkeys([*kinds, Error, AnthropicError]))
    references, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    refs = dict(zip(kinds, references, strict=True))
    pooling = {kind.__name__ for kind in kinds if issubclass(kind, PoolingRequest)}
    for name, schema in schemas.items():
        _refine(schema.get("properties", {}), () if name in pooling else REFUSED)
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        path = re.sub(r":\w+}", "}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = _operation(one, path, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "vllm-di", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _operation(one: Operation, path: str, refs: dict[type, dict[str, Any]]) -> dict[str, Any]:
    error = refs[AnthropicError if path.startswith("/v1/messages") else Error]
    statuses = sorted({*_ALWAYS, *(_WITH_BODY if one.body is not None else ()), *one.statuses})
    responses: dict[str, Any] = {
        "200": {"description": one.summary, "content": _content(one, refs)}
    }
    for status in statuses:
        body = refs[one.answer] if status in one.as_answered and one.answer else error
        responses[str(status)] = {
            "description": _STATUSES[status],
            "content": {"application/json": {"schema": body}},
        }
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{one.method.lower()}{path}").strip("_"),
        "summary": one.summary,
        "responses": responses,
    }
    if names := re.findall(r"{(\w+)}", path):
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if one.body is not None:
        content = {"application/json": {"schema": refs[one.body]}}
        found["requestBody"] = {"required": True, "content": content}
    if one.path in OPEN_PATHS:
        found["security"] = []
    return found


def _content(one: Operation, refs: dict[type, dict[str, Any]]) -> dict[str, Any]:
    if one.answer is None:
        return {one.media_type: {"schema": {}}}
    content = {"application/json": {"schema": refs[one.answer]}}
    if one.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return content


def _refine(properties: dict[str, Any], refused: Sequence[str]) -> None:
    """Fields without those that are always refused, numbers with their ranges."""
    for name in refused:
        properties.pop(name, None)
    for schema in properties.values():
        if EXACT in schema:
            schema["anyOf"] = schema.pop(EXACT)
    for name, (low, high) in RANGES.items():
        for schema in _numbers(properties.get(name, {})):
            at_least = "exclusiveMinimum" if name == "top_p" else "minimum"
            schema[at_least] = max(low, schema.get("minimum", low))
            schema["maximum"] = min(high, schema.get("maximum", high))


def _numbers(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for one in schema.get("anyOf", [schema]):
        if one.get("type") in ("integer", "number"):
            yield one
