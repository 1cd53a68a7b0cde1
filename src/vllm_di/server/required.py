"""Tool calls that must come: a grammar makes certain of them, whatever form the model knows."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_di.components.interfaces import (
    ParserEvent,
    ParserRequest,
    ParserState,
    ToolCallArguments,
    ToolCallBegun,
    ToolParser,
)
from vllm_di.components.tool_parser.asked import Asked, Tool
from vllm_di.components.tool_parser.json_calls import JsonCallParser, JsonCalls

_LITERAL = ("enum", "const", "default", "examples")
"""Keywords whose values are data, no schemas."""


class RequiredCalls(ToolParser):
    """Reads what ``constraint`` allows: a list of calls, or the arguments of the one named."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked

    def check(self, request: Mapping[str, Any]) -> None:
        """Done by the parser of the slot."""

    def constraint(self) -> dict[str, Any]:
        """For ``SamplingParams.structured_output``."""
        asked = self._asked
        if asked.choice == "named":
            schema = asked.tools[asked.named].parameters
            return {"schema": schema, "place": f"[{asked.named}].function.parameters"}
        calls: dict[str, Any] = {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_call(tool, i) for i, tool in enumerate(asked.tools)]},
        }
        return {"schema": calls if asked.parallel else calls | {"maxItems": 1}}

    def start(self, request: ParserRequest) -> ParserState:
        if self._asked.choice == "named":
            return _Named(self._asked.tools[self._asked.named].name)
        return JsonCalls(JsonCallParser, [tool.name for tool in self._asked.tools], streams=True)


class _Named(ParserState):
    """All of the text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._begun: ToolCallBegun | None = ToolCallBegun(0, f"call_{uuid.uuid4().hex}", name)

    def feed(self, delta: str) -> Sequence[ParserEvent]:
        first = [self._begun] if self._begun is not None else []
        self._begun = None
        return [*first, ToolCallArguments(0, delta)]

    def finish(self) -> Sequence[ParserEvent]:
        return []


def _call(tool: Tool, index: int) -> dict[str, Any]:
    place = f"#/items/anyOf/{index}/properties/parameters"
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            "parameters": _moved(tool.parameters, place),
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(part: Any, place: str) -> Any:
    """A schema whose references to its own root lead to ``place``."""
    if isinstance(part, list):
        return [_moved(one, place) for one in part]
    if not isinstance(part, dict):
        return part
    moved = {k: v if k in _LITERAL else _moved(v, place) for k, v in part.items()}
    ref = moved.get("$ref")
    if isinstance(ref, str) and ref.startswith("#"):
        moved["$ref"] = place + ref[1:]
    return moved
