"""How an answer may think, beside what constrains it: the server says it, workers follow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from vllm_di.errors import RequestError

KEY = "thought"
"""In ``SamplingParams.structured_output``; what stands beside it constrains the answer."""
PARAM = "thinking_token_budget"
"""What errors name: no client writes a ``Thought``."""
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Ids = Annotated[
    list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1, max_length=256)
]
Marks = Annotated[list[Text], msgspec.Meta(min_length=1, max_length=16)]


class Thought(msgspec.Struct, frozen=True, kw_only=True):
    """How one answer may think. The server makes it from the marks of its reasoning parser."""

    begins: Literal["inside", "before"]
    """Inside of a thought, or before one that may come."""
    opening: Marks
    closing: Marks
    opening_ids: Annotated[list[Ids], msgspec.Meta(max_length=16)] = []
    """Openings with which an answer that has a grammar may begin instead of the grammar."""
    closing_ids: Ids
    """The tokens that close a thought whose budget is used up."""
    budget: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Most tokens between the marks."""


def split(asked: Mapping[str, Any]) -> tuple[Thought | None, dict[str, Any]]:
    """The thought in ``SamplingParams.structured_output``, and the rest. Raises RequestError."""
    rest = {name: value for name, value in asked.items() if name != KEY}
    if KEY not in asked:
        return None, rest
    try:
        return msgspec.convert(asked[KEY], Thought), rest
    except msgspec.ValidationError as error:
        raise RequestError(f"structured_output.{KEY}: {error}", param=PARAM) from None
