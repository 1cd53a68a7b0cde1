"""The page at ``/`` (three files of this folder) and ``/assembly``, which it shows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from vllm_di.errors import RequestError
from vllm_di.server.hosts import Hosts, is_loopback
from vllm_di.server.service import Service

FOLDER = Path(__file__).parent
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
"""A model's answer is hostile input: nothing in it can become markup, a script or a request to
another host."""


class Page:
    """Answers on the loopback interface, or where the server has API keys: then the files are open
    to all, and ask for a key with which ``/assembly`` is read."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._assembly: bytes | None = None

    async def index(self, request: Request) -> Response:
        return self._file(request, "index.html", "text/html; charset=utf-8")

    async def style(self, request: Request) -> Response:
        return self._file(request, "page.css", "text/css; charset=utf-8")

    async def script(self, request: Request) -> Response:
        return self._file(request, "page.js", "text/javascript; charset=utf-8")

    async def assembly(self, request: Request) -> Response:
        """What fills each slot. Made when it is first asked for: it reads the config's files."""
        self._check_open(request)
        if self._assembly is None:
            overview = self._service.overview
            if overview is None:
                raise RequestError(
                    "whoever started this server did not say how it was assembled",
                    code="assembly_unknown",
                    status=404,
                )
            self._assembly = msgspec.json.encode(await asyncio.to_thread(overview))
        headers = {"content-type": "application/json", "x-content-type-options": "nosniff"}
        return Response(self._assembly, headers=headers)

    def _file(self, request: Request, name: str, kind: str) -> Response:
        self._check_open(request)
        return Response((FOLDER / name).read_bytes(), headers={**HEADERS, "content-type": kind})

    def _check_open(self, request: Request) -> None:
        """Raise RequestError: 404 where the page is off, 421 for a web page's own name."""
        service = self._service
        if not service.config.page:
            raise RequestError("the page is off (server.page=false)", code="page_off", status=404)
        if service.has_keys:
            return
        address = request.scope.get("server")
        if not address or not is_loopback(str(address[0])):
            raise RequestError(
                "the page is there on the loopback interface, or where the server has API keys "
                "(server.api_key_file)",
                code="page_off",
                status=404,
            )
        host = request.headers.get("host")
        names = Hosts(service.config.allowed_hosts, is_open=False)
        names.check(None if host is None else host.encode("latin-1"))
