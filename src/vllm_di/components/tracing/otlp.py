"""Spans by OpenTelemetry's OTLP over HTTP, in batches, from a thread of their own."""

from __future__ import annotations

import logging
import threading
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from vllm_di.components.interfaces import TracedRequest, Tracing
from vllm_di.components.tracing.attributes import attributes, span_name
from vllm_di.errors import ConfigError

log = logging.getLogger(__name__)


class OtlpTracing(Tracing):
    """A span for each request, whose parent is the client's ``traceparent``.

    ``record`` puts a span into a queue of ``max_queue``; beyond, spans are dropped. A thread sends
    them. While the collector cannot be reached, spans are lost, which one line says; another one
    says when it takes spans again. ``close`` sends what is left, within ``close_seconds``.

    Headers of the export (a key of the collector's, say) and its certificates come from
    OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE.
    Raises ConfigError where opentelemetry is not installed.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        service_name: str,
        sample_ratio: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)],
        max_queue: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)],
        max_batch: Annotated[int, msgspec.Meta(ge=1, le=100_000)],
        delay_seconds: Annotated[float, msgspec.Meta(gt=0.0, le=600.0)],
        timeout_seconds: Annotated[float, msgspec.Meta(gt=0.0, le=600.0)],
        close_seconds: Annotated[float, msgspec.Meta(ge=0.0, le=600.0)],
    ) -> None:
        if not _is_url(endpoint):
            raise ConfigError(
                f"endpoint: {endpoint!r}: expected the URL of a collector that takes OTLP over "
                "HTTP, such as http://127.0.0.1:4318/v1/traces"
            )
        if max_batch > max_queue:
            raise ConfigError(f"max_batch: {max_batch} is more than max_queue={max_queue} holds")
        try:
            from vllm_di.components.tracing.export import Spans
        except ImportError as error:
            raise ConfigError(
                f"tracing=otlp needs the package {error.name}, which is not installed: "
                "pip install 'vllm-di[otlp]', or choose tracing=none"
            ) from None
        self._close_seconds = close_seconds
        self._spans = Spans(
            endpoint=endpoint,
            service_name=service_name,
            sample_ratio=sample_ratio,
            max_queue=max_queue,
            max_batch=max_batch,
            delay_seconds=delay_seconds,
            timeout_seconds=timeout_seconds,
        )

    def record(self, request: TracedRequest) -> None:
        span = self._spans.begin(span_name(request), request.started, request.headers)
        if span is None:
            return
        is_ours = request.status >= 500 or request.error == "internal_error"
        failure = (request.error or f"status {request.status}") if is_ours else None
        self._spans.end(span, attributes(request), request.ended, failure)

    def close(self) -> None:
        """Send what waits. A collector that is down holds nobody up for longer than
        ``close_seconds``."""
        closing = threading.Thread(target=self._spans.close, daemon=True, name="last spans")
        closing.start()
        closing.join(self._close_seconds)
        if closing.is_alive():
            log.warning(
                "tracing: the last spans were not sent within %g s (tracing.close_seconds)",
                self._close_seconds,
            )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
