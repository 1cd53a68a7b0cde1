"""A collector of OpenTelemetry on loopback, which decodes what it gets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any

HAS_OTLP = all(
    find_spec(name) is not None
    for name in ("opentelemetry", "opentelemetry.exporter", "opentelemetry.exporter.otlp")
)
"""Whether the extra otlp is installed."""


class Collector:
    """``spans``: as OTLP has them, with their attributes as a dict in ``attributes_of``."""

    def __init__(self, address: str) -> None:
        self.url = f"{address}/v1/traces"
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.status = 200
        self.num_asked = 0

    def take(self, path: str, body: bytes) -> int:
        self.num_asked += 1
        if path != "/v1/traces":
            return 404
        if self.status == 200:
            from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

            message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            for group in message.resource_spans:
                self.resources.append(attributes_of(group.resource))
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return self.status


def attributes_of(part: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in part.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(collector.take(self.path, body))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
