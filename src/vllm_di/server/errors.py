"""Errors as clients see them."""

from __future__ import annotations

import orjson

from vllm_di.errors import EngineDeadError, QueueFullError, RequestError
from vllm_di.server.anthropic.errors import anthropic_error

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


def unavailable(message: str, code: str) -> RequestError:
    """A 503 that may pass soon."""
    return RequestError(message, code=code, status=503)


def as_request_error(error: Exception) -> RequestError:
    """The error that the client sees. Details of an unexpected one are only logged."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDeadError):
        return RequestError(f"the engine died: {error}", code="engine_dead", status=503)
    return RequestError("internal server error", code="internal_error", status=500)


def error_body(error: RequestError, path: str) -> bytes:
    """In the form of the API that ``path`` belongs to."""
    is_anthropic = path.startswith("/v1/messages")
    return anthropic_error(error) if is_anthropic else openai_error(error)


def openai_error(error: RequestError) -> bytes:
    """``{"error": {message, type, param, code}}``."""
    server_side = "server_error" if error.status >= 500 else "invalid_request_error"
    return orjson.dumps(
        {
            "error": {
                "message": error.message,
                "type": _TYPES.get(error.status, server_side),
                "param": error.param,
                "code": error.code,
            }
        }
    )


def retry_after(error: RequestError) -> int | None:
    """Seconds for the Retry-After header; None where a retry does not help."""
    if isinstance(error, QueueFullError):
        return error.retry_after
    return 1 if error.status == 503 and error.code != "engine_dead" else None
