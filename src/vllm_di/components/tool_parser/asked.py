"""What a request says of tools: read and checked once, for all parsers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import msgspec

from vllm_di.errors import RequestError, nearest

Choice = Literal["auto", "none", "required", "named"]
LONGEST_NAME = 256


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    parameters: dict[str, Any]
    """JSON schema of its arguments, an object."""


class Asked(msgspec.Struct, frozen=True):
    """The tools of a request, and which of them may or must be called."""

    tools: list[Tool]
    """Those that may be called: of ``allowed_tools`` a part of the request's."""
    choice: Choice
    named: int = -1
    """Place of the tool that must be called; -1 where none is named."""
    parallel: bool = True
    """Whether one answer may call several."""


def read_tools(request: Mapping[str, Any]) -> Asked:
    """Raises RequestError with ``param`` for tools that are malformed or bear one name, and for a
    ``tool_choice`` that does not fit them. OpenAI's ``allowed_tools`` leaves the others out: they
    stand in the prompt alone."""
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if request.get(name) not in (None, "none", []):
            raise RequestError(
                f"{name} is OpenAI's old form: use {instead}",
                param=name,
                code="unsupported_parameter",
            )
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.get("tools") or ())]
    names: dict[str, int] = {}
    for i, tool in enumerate(tools):
        if (before := names.setdefault(tool.name, i)) != i:
            raise RequestError(
                f"tools[{i}].function.name: {tool.name!r} is the name of tools[{before}] too",
                param="tools",
            )
    wanted = request.get("tool_choice")
    if isinstance(wanted, Mapping) and wanted.get("type") == "allowed_tools":
        wanted, allowed = _allowed(wanted.get("allowed_tools"), names)
        tools = [tool for tool in tools if tool.name in allowed]
    choice, named = _choice(wanted, names)
    if choice != "none" and wanted is not None and not tools:
        raise RequestError("tool_choice goes only with tools", param="tool_choice")
    return Asked(tools, choice, named, request.get("parallel_tool_calls") is not False)


def _tool(tool: Any, place: str) -> Tool:
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if kind != "function" or not isinstance(function, Mapping):
        what = "" if kind in ("function", None) else f".type: {str(kind)[:100]!r} is not supported"
        raise RequestError(
            f'{place}{what}: expected {{"type": "function", "function": {{"name": ..., '
            '"parameters": {...}}}',
            param="tools",
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME:
        raise RequestError(
            f"{place}.function.name: expected a text of up to {LONGEST_NAME} characters",
            param="tools",
        )
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise RequestError(f"{place}.function.parameters: expected a JSON schema", param="tools")
    return Tool(name, {"type": "object", **parameters})


def _choice(value: Any, names: Mapping[str, int]) -> tuple[Choice, int]:
    """``names``: of the tools, to their places."""
    if value is None:
        return ("auto" if names else "none"), -1
    if value in ("auto", "none", "required"):
        return value, -1
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or value.get("type", "function") != "function":
        raise RequestError(
            "tool_choice: expected auto, none, required, "
            '{"type": "function", "function": {"name": ...}}, or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
            param="tool_choice",
        )
    _check_known(name, names, "tool_choice")
    return "named", names[name]


def _allowed(value: Any, names: Collection[str]) -> tuple[Literal["auto", "required"], set[str]]:
    """-> the mode, and the names of the tools that may be called."""
    mode = value.get("mode") if isinstance(value, Mapping) else None
    listed = value.get("tools") if isinstance(value, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        raise RequestError(
            'tool_choice.allowed_tools: expected {"mode": "auto" or "required", "tools": [...]}, '
            "with a tool or more",
            param="tool_choice",
        )
    allowed: set[str] = set()
    for index, tool in enumerate(listed):
        place = f"tool_choice.allowed_tools.tools[{index}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or tool.get("type", "function") != "function":
            raise RequestError(
                f'{place}: expected {{"type": "function", "function": {{"name": ...}}}}',
                param="tool_choice",
            )
        _check_known(name, names, place)
        allowed.add(name)
    return mode, allowed


def _check_known(name: str, names: Collection[str], place: str) -> None:
    if name not in names:
        raise RequestError(
            f"{place}: no tool is called {name[:100]!r}{nearest(name[:100], names)}",
            param="tool_choice",
        )
