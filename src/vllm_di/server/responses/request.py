"""OpenAI's Responses requests, decoded strictly, and the chat request that each stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any

import msgspec

from vllm_di.errors import RequestError, nearest
from vllm_di.server.protocol import (
    Budget,
    ChatRequest,
    Int,
    Object,
    SamplingRequest,
    ShortText,
    Tools,
    unsupported,
)

Items = Annotated[list[Object], msgspec.Meta(max_length=16_384)]


class Reasoning(msgspec.Struct):
    effort: ShortText | None = None
    summary: Any = None
    """Without effect: nothing here sums up."""


class Output(msgspec.Struct):
    format: Object | None = None
    verbosity: ShortText | None = None
    """Without effect."""


class ResponsesRequest(SamplingRequest, kw_only=True):
    """``POST /v1/responses``."""

    input: str | Items
    instructions: str | None = None
    previous_response_id: ShortText | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] | None = None
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Output | None = None
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=16)] | None = None
    truncation: ShortText | None = None
    """``auto`` and ``disabled`` are the same here: nothing is left out of a prompt, and one that is
    too long is refused."""
    include: list[ShortText] | None = None
    """Without effect, but for ``LOGPROBS``, which is refused."""
    # vLLM's extensions, beside those of every request for text
    chat_template_kwargs: Object | None = None
    thinking_token_budget: Budget | None = None
    # known, and refused when given
    conversation: Any = None
    prompt: Any = None
    top_logprobs: Int | None = None
    # without effect
    max_tool_calls: Int | None = None
    """Bounds calls of tools that run in the server: there are none."""
    stream_options: Any = None


LOGPROBS = "message.output_text.logprobs"
AS_THEY_ARE = (
    *SamplingRequest.__struct_fields__,
    "parallel_tool_calls",
    "chat_template_kwargs",
    "thinking_token_budget",
)
"""Fields that go into the chat request unchanged."""


class Text(msgspec.Struct):
    text: str


class Message(msgspec.Struct):
    role: str
    content: str | list[Object]


class Call(msgspec.Struct):
    call_id: str
    name: str
    arguments: str


class CallOutput(msgspec.Struct):
    call_id: str
    output: str | list[Object]


class Thought(msgspec.Struct):
    content: list[Text] | None = None
    summary: list[Text] = []


_ITEMS: dict[str, type[msgspec.Struct]] = {
    "message": Message,
    "function_call": Call,
    "function_call_output": CallOutput,
    "reasoning": Thought,
}
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = ("input_text", "output_text", "text")


def chat_request(request: ResponsesRequest, conversation: Sequence[Object]) -> ChatRequest:
    """The same request as one for chat completions; ``conversation``: all messages up to its end.
    Raises RequestError for what has none."""
    for name in ("conversation", "prompt", "top_logprobs"):
        if getattr(request, name):
            raise unsupported(name)
    if LOGPROBS in (request.include or ()):
        raise RequestError(f"include: {LOGPROBS} is not supported by this server", param="include")
    if request.truncation not in (None, "auto", "disabled"):
        raise RequestError("truncation: expected auto or disabled", param="truncation")
    messages = [*conversation]
    if request.instructions:  # they hold for this response alone, so they are not kept
        messages.insert(0, {"role": "system", "content": request.instructions})
    fields: dict[str, Any] = {
        "messages": messages,
        "max_tokens": request.max_output_tokens,
        "tools": [_tool(tool) for tool in request.tools or ()] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
        "response_format": _format(request.text.format if request.text else None),
    }
    fields |= {name: value for name in AS_THEY_ARE if (value := getattr(request, name)) is not None}
    return msgspec.convert(fields, ChatRequest)


def messages_of(given: str | list[Object]) -> list[Object]:
    """Chat messages. What an assistant said, thought and called, one item after another, is one."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise RequestError("input must not be empty", param="input")
    return list(_merged(_item(item, f"input[{i}]") for i, item in enumerate(given)))


def _merged(messages: Iterator[Object]) -> Iterator[Object]:
    for role, several in groupby(messages, lambda message: message["role"]):
        if role == "assistant":
            yield _joined([*several])
        else:
            yield from several


def _joined(parts: Sequence[Object]) -> Object:
    """One message of an assistant's."""
    joined: Object = {"role": "assistant", "content": ""}
    for name in ("content", "reasoning_content"):
        if text := "".join(part.get(name, "") for part in parts):
            joined[name] = text
    if calls := [call for part in parts for call in part.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def _item(item: Object, place: str) -> Object:
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise RequestError(
            f"{place}: {str(kind)[:100]!r} is not supported by this server"
            f"{nearest(str(kind)[:100], _ITEMS)}",
            param="input",
        )
    try:
        part = msgspec.convert(item, _ITEMS[kind])
    except msgspec.ValidationError as error:
        raise RequestError(f"{place}: {error}", param="input") from None
    if isinstance(part, Call):
        function = {"name": part.name, "arguments": part.arguments}
        calls = [{"id": part.call_id, "type": "function", "function": function}]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if isinstance(part, CallOutput):
        output = _text(part.output, f"{place}.output")
        return {"role": "tool", "tool_call_id": part.call_id, "content": output}
    if isinstance(part, Thought):
        thoughts = "".join(text.text for text in part.content or part.summary)
        return {"role": "assistant", "content": "", "reasoning_content": thoughts}
    assert isinstance(part, Message)
    if part.role not in _ROLES:
        raise RequestError(
            f"{place}.role: expected {', '.join(_ROLES)}, got {part.role[:50]!r}"
            f"{nearest(part.role[:50], _ROLES)}",
            param="input",
        )
    return {"role": _ROLES[part.role], "content": _text(part.content, f"{place}.content")}


def _text(content: str | list[Object], place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.get("refusal") if part.get("type") == "refusal" else part.get("text")
        if part.get("type") not in (*_TEXTS, "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{place}[{index}]: expected a text part (input_text, output_text), got "
                f"{str(part.get('type'))[:100]!r}",
                param="input",
            )
        texts.append(text)
    return "".join(texts)


def _tool(tool: Object) -> Object:
    kind = tool.get("type")
    if kind != "function" or not isinstance(tool.get("name"), str):
        raise RequestError(
            f"tools: {str(kind)[:100]!r}: this server has tools of the type function, with a name",
            param="tools",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        tools = [_tool_choice(tool) for tool in listed] if isinstance(listed, list) else listed
        allowed = {"mode": choice.get("mode"), "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice  # the tool parser checks it


def _format(wanted: Object | None) -> Object | None:
    if wanted is None or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": {k: v for k, v in wanted.items() if k != "type"}}
