"""No reasoning part: a request that steers or wants one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_di.components.interfaces import ParserRequest, ReasoningParser
from vllm_di.errors import RequestError

_FIELDS = ("reasoning_effort", "reasoning", "thinking", "thinking_token_budget")


class NoReasoningParser(ReasoningParser):
    """Passes text through."""

    def check(self, request: Mapping[str, Any]) -> None:
        for field in _FIELDS:
            value = request.get(field)
            if not (value is None or value is False or value == "none"):  # a budget of 0 is one
                raise RequestError(
                    f"{field}: this server runs without a reasoning parser (reasoning_parser=none)",
                    param=field,
                    code="unsupported_parameter",
                )

    def start(self, request: ParserRequest) -> None:
        """All text is content."""
