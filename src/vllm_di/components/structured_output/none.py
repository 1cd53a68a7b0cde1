"""No grammars: a request for structured output is refused, never ignored."""

from __future__ import annotations

from vllm_di.components.interfaces import StructuredOutput
from vllm_di.components.messages import SamplingParams
from vllm_di.components.structured_output.thought import PARAM, split
from vllm_di.errors import RequestError


class NoStructuredOutput(StructuredOutput):
    """Takes free text alone."""

    def __init__(self) -> None: ...

    def check(self, params: SamplingParams) -> None:
        if params.structured_output is None:
            return
        thought, asked = split(params.structured_output)
        what, param = "structured output is", next(iter(asked), "response_format")
        if thought is not None and not asked:
            what, param = "a thinking budget is", PARAM
        raise RequestError(
            f"{what} not available: the slot structured_output is `none`; start with "
            "structured_output=llguidance",
            param=param,
            code="unsupported_parameter",
        )
