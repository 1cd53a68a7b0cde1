"""No tool calls: a request that needs them is refused, never half-answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_di.components.interfaces import ParserRequest, ToolParser
from vllm_di.errors import RequestError


class NoToolParser(ToolParser):
    """Passes text through."""

    def check(self, request: Mapping[str, Any]) -> None:
        wanted = next((key for key in ("tools", "functions") if request.get(key)), None)
        if wanted is None:
            choices = ("tool_choice", "function_call")
            wanted = next((k for k in choices if request.get(k) not in (None, "none")), None)
        if wanted is not None:
            raise RequestError(
                f"{wanted}: this server runs without a tool parser (tool_parser=none)",
                param=wanted,
                code="unsupported_parameter",
            )

    def start(self, request: ParserRequest) -> None:
        """All text is content."""
