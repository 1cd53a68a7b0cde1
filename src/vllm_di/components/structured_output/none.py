"""No grammars: a request for structured output is refused, never ignored."""

from __future__ import annotations

from vllm_di.components.interfaces import StructuredOutput
from vllm_di.components.messages import SamplingParams
from vllm_di.errors import RequestError


class NoStructuredOutput(StructuredOutput):
    """Takes free text alone."""

    def __init__(self) -> None: ...

    def check(self, params: SamplingParams) -> None:
        if params.structured_output is not None:
            raise RequestError(
                "structured output is not available: the slot structured_output is `none`; start "
                "with structured_output=llguidance",
                param=next(iter(params.structured_output), "response_format"),
                code="unsupported_parameter",
            )
