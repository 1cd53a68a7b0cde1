"""Errors in Anthropic's form."""

from __future__ import annotations

import orjson

from vllm_di.errors import RequestError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: RequestError) -> bytes:
    """``{"type": "error", "error": {type, message}}``. The form has no field for the parameter, so
    the message begins with it."""
    message = error.message
    if error.param and error.param not in message:
        message = f"{error.param}: {message}"
    kind = _TYPES.get(error.status, "invalid_request_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})
