"""OpenTelemetry's SDK, as far as it is used. Imported where ``tracing=otlp`` is built, and nowhere
else."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace import span as span_module
from opentelemetry.trace.propagation import tracecontext

from vllm_di.components.tracing.attributes import Value
from vllm_di.version import __version__

_NANOSECONDS = 1_000_000_000

log = logging.getLogger(__name__)


class Spans:
    """A tracer, and the thread that sends its spans in batches."""

    def __init__(
        self,
        *,
        endpoint: str,
        service_name: str,
        sample_ratio: float,
        max_queue: int,
        max_batch: int,
        delay_seconds: float,
        timeout_seconds: float,
    ) -> None:
        for module in (trace_exporter, tracecontext, span_module):
            logging.getLogger(module.__name__).addFilter(_silent)
        exporter: Any = trace_exporter.OTLPSpanExporter(endpoint=endpoint, timeout=timeout_seconds)
        self._exporter = WatchedExporter(exporter, endpoint)
        self._max_queue, self._num_queued, self._is_full = max_queue, 0, False
        processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=max_queue,
            max_export_batch_size=max_batch,
            schedule_delay_millis=delay_seconds * 1000,
        )
        self._provider: Any = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create(
                {"service.name": service_name, "service.version": __version__}
            ),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer: Any = self._provider.get_tracer("vllm_di", __version__)
        self._parents: Any = tracecontext.TraceContextTextMapPropagator()

    def begin(self, name: str, started: float, headers: Mapping[str, str]) -> Any:
        """A span of a server, whose parent is the ``traceparent`` among ``headers``; None where it
        is not sampled. ``started``: seconds since the epoch."""
        span = self._tracer.start_span(
            name,
            context=self._parents.extract(headers),
            kind=SpanKind.SERVER,
            start_time=int(started * _NANOSECONDS),
        )
        return span if span.is_recording() else None

    def end(
        self, span: Any, attributes: Mapping[str, Value], ended: float, failure: str | None
    ) -> None:
        """Put the span into the queue, or drop it where there is no room. ``failure``: of the
        server, in a word."""
        if not self._has_room():
            return
        span.set_attributes(attributes)
        if failure is not None:
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end(int(ended * _NANOSECONDS))
        self._num_queued += 1

    def _has_room(self) -> bool:
        """The processor's queue drops its oldest spans without a word: so it never gets full."""
        num_waiting = self._num_queued - self._exporter.num_taken
        if num_waiting >= self._max_queue:
            if not self._is_full:
                text = "tracing: %d spans wait (tracing.max_queue): further ones are dropped"
                log.warning(text, num_waiting)
            self._is_full = True
            return False
        self._is_full = self._is_full and num_waiting > 0
        return True

    def close(self) -> None:
        """Send what waits, however long it takes."""
        self._provider.shutdown()


class WatchedExporter:
    """An exporter, with a line when the collector takes no spans, and one when it does again."""

    def __init__(self, exporter: Any, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, endpoint
        self.num_taken = 0
        """Spans that have left the queue."""
        self._num_lost = 0

    def export(self, spans: Sequence[Any]) -> Any:
        """Called in the processor's thread. Raises nothing."""
        self.num_taken += len(spans)
        try:
            result, why = self._exporter.export(spans), ""
        except Exception as error:  # of its HTTP library
            result, why = SpanExportResult.FAILURE, f" ({error})"
        if result is SpanExportResult.SUCCESS:
            if self._num_lost:
                text = "tracing: %s takes spans again; %d were lost"
                log.warning(text, self._endpoint, self._num_lost)
            self._num_lost = 0
            return result
        if not self._num_lost:
            text = "tracing: %s takes no spans%s: they are lost until it does"
            log.warning(text, self._endpoint, why)
        self._num_lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> Any:
        return self._exporter.force_flush(timeout_millis)


def _silent(_record: logging.LogRecord) -> bool:
    """The exporter says each failure and each retry; ``WatchedExporter`` says it once. The others
    repeat whatever a client sent as ``traceparent`` or ``tracestate``."""
    return False
