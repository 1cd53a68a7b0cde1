"""Anthropic's requests, decoded strictly, and the chat request that each stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import orjson

from vllm_di.errors import RequestError, nearest
from vllm_di.server.protocol import (
    ChatRequest,
    Int,
    Object,
    ShortText,
    Stops,
    StreamRequest,
    Tools,
    unsupported,
)


class Text(msgspec.Struct, tag="text"):
    text: str


class Thinking(msgspec.Struct, tag="thinking"):
    thinking: str


class RedactedThinking(msgspec.Struct, tag="redacted_thinking"):
    """What another server encrypted: nobody here can read it, so it is left out."""


class ToolUse(msgspec.Struct, tag="tool_use"):
    id: str
    name: str
    input: Object


class Image(msgspec.Struct, tag="image"):
    """Known, and refused."""


class Document(msgspec.Struct, tag="document"):
    """Known, and refused."""


class ToolResult(msgspec.Struct, tag="tool_result"):
    tool_use_id: str
    content: str | list[Text | Image | Document] = ""
    is_error: bool | None = None
    """The model sees the text alone: chat templates have no place for it."""


Block = Text | Thinking | RedactedThinking | ToolUse | ToolResult | Image | Document
Blocks = Annotated[list[Block], msgspec.Meta(max_length=16_384)]


class Message(msgspec.Struct):
    role: str
    content: str | Blocks


class ConversationRequest(StreamRequest, kw_only=True):
    """``POST /v1/messages/count_tokens``, and what it shares with ``/v1/messages``."""

    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=16_384)]
    system: str | Annotated[list[Text], msgspec.Meta(max_length=1024)] | None = None
    tools: Tools | None = None
    tool_choice: Object | None = None
    thinking: Object | None = None
    output_config: Object | None = None
    # known, and refused when given
    mcp_servers: Any = None
    container: Any = None
    # without effect: the prefix cache is automatic
    cache_control: Any = None


class MessagesRequest(ConversationRequest, kw_only=True):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    stop_sequences: Stops | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Int | None = None
    # without effect
    metadata: Any = None
    service_tier: ShortText | None = None
    speed: Any = None
    inference_geo: Any = None


def chat_request(request: ConversationRequest) -> ChatRequest:
    """The same request in OpenAI's form. Raises RequestError for what has none."""
    for name in ("mcp_servers", "container"):
        if getattr(request, name):
            raise unsupported(name)
    fields: dict[str, Any] = {"model": request.model, "messages": list(_messages(request))}
    if fields["messages"][-1]["role"] == "assistant":
        fields["continue_final_message"] = True
    if request.tools:
        fields["tools"] = [_tool(tool) for tool in request.tools]
    fields |= _tool_choice(request.tool_choice) | _thinking(request.thinking)
    fields |= _output(request.output_config or {})
    if isinstance(request, MessagesRequest):
        fields["stop"] = request.stop_sequences
        for name in ("max_tokens", "stream", "temperature", "top_p", "top_k"):
            fields[name] = getattr(request, name)
    return msgspec.convert(fields, ChatRequest)


def _messages(request: ConversationRequest) -> Iterator[Object]:
    if isinstance(request.system, str):
        yield {"role": "system", "content": request.system}
    elif request.system:
        yield {"role": "system", "content": [_part(text) for text in request.system]}
    for index, message in enumerate(request.messages):
        place = f"messages[{index}]"
        if message.role not in ("user", "assistant"):
            raise RequestError(
                f"{place}.role: expected user or assistant, got {message.role[:50]!r}"
                f"{nearest(message.role, ['user', 'assistant'])}; a system prompt goes into system",
                param="messages",
            )
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "user":
            yield from _of_user(message.content, place)
        else:
            yield _of_assistant(message.content, place)


def _of_user(blocks: list[Block], place: str) -> Iterator[Object]:
    """Each tool's result is a message of its own in OpenAI's form."""
    texts: list[Object] = []
    for index, block in enumerate(blocks):
        if isinstance(block, ToolResult):
            if texts:
                yield {"role": "user", "content": texts}
                texts = []
            content = block.content
            if not isinstance(content, str):
                inner = f"{place}.content[{index}].content"
                content = "\n".join(_texts(content, inner))
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
        elif isinstance(block, Text):
            texts.append(_part(block))
        else:
            raise _refusal(block, f"{place}.content[{index}]", "a user's message")
    if texts or not blocks:
        yield {"role": "user", "content": texts or ""}


def _of_assistant(blocks: list[Block], place: str) -> Object:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        if isinstance(block, Text):
            texts.append(block.text)
        elif isinstance(block, Thinking):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": orjson.dumps(block.input).decode()}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif not isinstance(block, RedactedThinking):
            raise _refusal(block, f"{place}.content[{index}]", "an assistant's message")
    message: Object = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _texts(blocks: list[Text | Image | Document], place: str) -> Iterator[str]:
    for index, block in enumerate(blocks):
        if not isinstance(block, Text):
            raise _refusal(block, f"{place}[{index}]", "a tool's result")
        yield block.text


def _part(text: Text) -> Object:
    return {"type": "text", "text": text.text}


def _refusal(block: msgspec.Struct, place: str, where: str) -> RequestError:
    kind = block.__struct_config__.tag
    if isinstance(block, Image | Document):
        return RequestError(f"{place}: {kind} is not supported by this server", param="messages")
    return RequestError(f"{place}: {kind} has no place in {where}", param="messages")


def _tool(tool: Object) -> Object:
    kind, name = tool.get("type") or "custom", tool.get("name")
    if kind != "custom":
        raise RequestError(
            f"tools: {str(kind)[:100]!r} runs on Anthropic's servers alone; "
            "give a tool of your own, with name and input_schema",
            param="tools",
        )
    if not isinstance(name, str) or not isinstance(tool.get("input_schema"), dict):
        raise RequestError(
            f"tools: {str(name)[:100]!r}: a tool needs a name and an input_schema", param="tools"
        )
    function = {"name": name, "parameters": tool["input_schema"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _tool_choice(choice: Object | None) -> Object:
    if choice is None:
        return {}
    kind = choice.get("type")
    if kind == "tool" and isinstance(choice.get("name"), str):
        fields: Object = {"tool_choice": {"type": "function", "function": {"name": choice["name"]}}}
    elif kind in _TOOL_CHOICES:
        fields = {"tool_choice": _TOOL_CHOICES[kind]}
    else:
        raise RequestError(
            "tool_choice: expected the type auto, any, none, or tool with a name, "
            f"got {str(kind)[:50]!r}",
            param="tool_choice",
        )
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _thinking(thinking: Object | None) -> Object:
    if thinking is None:
        return {}
    kind = thinking.get("type")
    if kind == "disabled":
        return {"chat_template_kwargs": {"enable_thinking": False}}
    if kind not in ("enabled", "adaptive"):
        raise RequestError(
            f"thinking: expected the type enabled, disabled or adaptive, got {str(kind)[:50]!r}",
            param="thinking",
        )
    fields = {"thinking": thinking, "chat_template_kwargs": {"enable_thinking": True}}
    if thinking.get("budget_tokens") is not None:
        fields["thinking_token_budget"] = thinking["budget_tokens"]
    return fields


def _output(config: Object) -> Object:
    fields: Object = {}
    if config.get("effort") is not None:
        fields["reasoning_effort"] = config["effort"]
    if (wanted := config.get("format")) is not None:
        if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
            raise RequestError(
                "output_config.format: expected the type json_schema", param="output_config"
            )
        schema = {"name": "output", "strict": True, "schema": wanted.get("schema")}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields
