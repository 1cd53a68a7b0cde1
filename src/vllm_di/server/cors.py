"""CORS: which other origins web pages may call this server from."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from vllm_di.errors import RequestError
from vllm_di.server.errors import openai_error
from vllm_di.server.request_id import HEADER, request_id


class Cors(CORSMiddleware):
    """Starlette's middleware, with refusals in OpenAI's form. It runs before the check of API keys,
    because browsers send none with a preflight. Keys are sent in the Authorization header, so CORS
    credentials (cookies) are not needed."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        own = {HEADER.decode(): request_id(dict(request_headers.raw)).decode()}
        if response.status_code < 400:
            response.headers.update(own)
            return response
        error = RequestError(
            f"{bytes(response.body).decode()} (server.cors_origins)", code="cors_refused"
        )
        headers = {**own, "vary": response.headers["vary"], "content-type": "application/json"}
        return Response(openai_error(error), response.status_code, headers=headers)
