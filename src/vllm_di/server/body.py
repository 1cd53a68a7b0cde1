"""Reads and decodes a request's body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from vllm_di.errors import RequestError
from vllm_di.server.errors import ClientGone
from vllm_di.server.protocol import decode, refuse_unknown
from vllm_di.server.service import Service

T = TypeVar("T", bound=msgspec.Struct)


async def read_request(request: Request, service: Service, kind: type[T]) -> T:
    """The decoded body. Raises RequestError: 400, 408, 413 or 415."""
    config = service.config
    body = await _read_body(request, config.max_body_bytes, config.body_timeout_seconds)
    decoded, unknown = decode(body, kind, max_depth=config.max_json_depth)
    if unknown:
        if config.unknown_fields == "refuse":
            refuse_unknown(kind, unknown)
        # Not every Metrics component counts these.
        count: Callable[[int], None] | None = getattr(service.metrics, "unknown_fields", None)
        if count is not None:
            count(len(unknown))
    return decoded


async def _read_body(request: Request, limit: int, timeout: float) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form on a hostile web page cannot send this type
        raise RequestError(
            "the body must be JSON, with the header Content-Type: application/json", status=415
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(
            f"Content-Encoding: {encoding[:50]} is not supported; send the body uncompressed",
            code="unsupported_encoding",
            status=415,
        )
    too_long = RequestError(
        f"the body is longer than {limit} bytes", code="body_too_large", status=413
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise RequestError("the body arrived too slowly", code="timeout", status=408) from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)
