"""Without a tool parser, a request that needs one is refused."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_di.components.interfaces import ParserRequest, ToolParser
from vllm_di.components.tool_parser.none import NoToolParser
from vllm_di.errors import RequestError


@pytest.mark.parametrize(
    "request_",
    [
        {"tools": [{}]},
        {"functions": [{}]},
        {"tool_choice": "auto"},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function"}},
        {"function_call": "auto"},
        {"tools": [{}], "tool_choice": "none"},
    ],
)
def test_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="tool_parser=none") as error:
        NoToolParser().check(request_)
    assert error.value.param == next(iter(request_))
    assert error.value.code == "unsupported_parameter"


def test_passes() -> None:
    NoToolParser().check({"tools": None, "tool_choice": "none", "functions": []})
    parser: ToolParser = NoToolParser()
    assert parser.start(ParserRequest({}, "")) is None, "all text is content"
