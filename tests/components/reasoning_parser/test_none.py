"""Without a reasoning parser, a request that needs one is refused."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_di.components.interfaces import ParserRequest, ReasoningParser
from vllm_di.components.reasoning_parser.none import NoReasoningParser
from vllm_di.errors import RequestError


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("reasoning_effort", "low"),
        ("reasoning", {"effort": "high"}),
        ("thinking", {"type": "enabled"}),
        ("thinking_token_budget", 10),
    ],
)
def test_refused(param: str, value: Any) -> None:
    with pytest.raises(RequestError, match="reasoning_parser=none") as error:
        NoReasoningParser().check({param: value})
    assert (error.value.param, error.value.code) == (param, "unsupported_parameter")


def test_passes() -> None:
    NoReasoningParser().check({"reasoning_effort": "none", "thinking": None})
    parser: ReasoningParser = NoReasoningParser()
    assert parser.start(ParserRequest({}, "")) is None, "all text is content"
