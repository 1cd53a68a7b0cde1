"""How much an answer may think, from the fields that clients have for it."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_di.components.interfaces import ParserRequest, ReasoningParser, ThoughtMarks, Tokenizer
from vllm_di.components.messages import SamplingParams
from vllm_di.components.structured_output.thought import KEY, Thought
from vllm_di.errors import RequestError
from vllm_di.server.protocol import Budget, ChatRequest

_KINDS = ("enabled", "adaptive", "disabled")
_SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates."""


def template_kwargs(request: ChatRequest) -> dict[str, Any]:
    """What the chat template is told: some read the effort, some whether to think at all. Raises
    RequestError."""
    kwargs: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
        kwargs["enable_thinking"] = request.reasoning_effort != "none"
    if (thinking := _thinking(request)) is not None:
        kwargs["enable_thinking"] = thinking["type"] != "disabled"
    return kwargs | (request.chat_template_kwargs or {})


def thinking_budget(request: ChatRequest) -> int | None:
    """In tokens. Raises RequestError."""
    if request.thinking_token_budget is not None:
        return request.thinking_token_budget
    budget = (_thinking(request) or {}).get("budget_tokens")
    try:
        return msgspec.convert(budget, Budget | None)
    except msgspec.ValidationError as error:
        raise RequestError(f"thinking.budget_tokens: {error}", param="thinking") from None


def _thinking(request: ChatRequest) -> dict[str, Any] | None:
    """Anthropic's field, which others have in chat requests as well."""
    thinking = request.thinking
    if thinking is None:
        return None
    if isinstance(thinking, bool):
        return {"type": "enabled" if thinking else "disabled"}
    if not isinstance(thinking, dict) or thinking.get("type") not in _KINDS:
        raise RequestError(
            f"thinking: expected one of the types {', '.join(_KINDS)}", param="thinking"
        )
    return thinking


def with_thought(
    params: SamplingParams,
    request: ChatRequest,
    parser: ReasoningParser,
    parser_request: ParserRequest,
    tokenizer: Tokenizer,
) -> tuple[SamplingParams, bool]:
    """-> parameters that see to the budget of a request's thought, and to its grammar behind it;
    and whether the answer may think. Raises RequestError."""
    budget, marks = thinking_budget(request), parser.marks(parser_request)
    constrained = params.structured_output is not None
    if budget is None and not constrained:
        return params, True
    if marks is None:
        if budget is not None:
            raise RequestError(
                f"a thinking budget is not supported: {type(parser).__qualname__} knows no mark "
                "that closes a thought",
                param="thinking_token_budget" if request.thinking is None else "thinking",
                code="unsupported_parameter",
            )
        return params, False
    thought = _thought(marks, budget, request, tokenizer, constrained=constrained)
    if thought is None:
        return params, not constrained
    asked = {**(params.structured_output or {}), KEY: msgspec.to_builtins(thought)}
    return msgspec.structs.replace(params, structured_output=asked), True


def _thought(
    marks: ThoughtMarks,
    budget: int | None,
    request: ChatRequest,
    tokenizer: Tokenizer,
    *,
    constrained: bool,
) -> Thought | None:
    """None where no thought comes."""
    if marks.begins == "behind":
        return None
    openings = _openings(marks, budget, request, tokenizer) if constrained else []
    if constrained and marks.begins == "before" and not openings:
        return None
    return Thought(
        begins=marks.begins,
        opening=list(marks.opening),
        closing=list(marks.closing),
        opening_ids=openings,
        closing_ids=_written(tokenizer, marks.closing[0]),
        budget=budget,
    )


def _openings(
    marks: ThoughtMarks, budget: int | None, request: ChatRequest, tokenizer: Tokenizer
) -> list[list[int]]:
    """Openings beside a grammar: not where the request wants no thought; and one of several tokens,
    whose first may be a word like any other, only where it wants one."""
    kwargs = template_kwargs(request)
    switches = [kwargs[name] for name in _SWITCHES if name in kwargs]
    if False in switches:
        return []
    is_wanted = budget is not None or any(switches)
    written = [_written(tokenizer, mark) for mark in marks.opening]
    return [ids for ids in written if len(ids) == 1 or is_wanted]


def _written(tokenizer: Tokenizer, mark: str) -> list[int]:
    """Raises RequestError for a mark that the vocabulary cannot write."""
    ids = tokenizer.encode(mark, add_special_tokens=False)
    if mark.encode() not in b"".join(map(tokenizer.token_bytes, ids)):
        raise RequestError(
            f"the model's vocabulary cannot write {mark!r}, the mark of its reasoning parser, so "
            "a thought can have neither a budget nor a grammar behind it",
            code="unsupported_parameter",
        )
    return ids
