"""No traces."""

from __future__ import annotations

from typing import ClassVar

from vllm_di.components.interfaces import TracedRequest, Tracing


class NoTracing(Tracing):
    """Nothing is recorded, and opentelemetry is not imported."""

    records: ClassVar[bool] = False

    def __init__(self) -> None: ...

    def record(self, request: TracedRequest) -> None:
        """Never called."""
