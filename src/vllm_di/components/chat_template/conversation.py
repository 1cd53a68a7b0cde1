"""Converts messages from the form that clients send to the form that templates read, and checks
them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_di.errors import RequestError

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which clients send the reasoning of an earlier turn. Templates read the first, that of
gpt-oss the second."""


class Form(msgspec.Struct, frozen=True):
    """Which forms of ``content`` a template supports: strings, lists of parts."""

    keeps_strings: bool = True
    keeps_parts: bool = False

    @property
    def wraps_strings(self) -> bool:
        return self.keeps_parts and not self.keeps_strings


class Forms(msgspec.Struct, frozen=True):
    """The form of each role for which the template was tried."""

    of_role: Mapping[str, Form]
    needs_content: bool = False
    """Whether the template fails at tool calls that come without content, as clients send them, and
    not at empty content."""

    def __getitem__(self, role: str) -> Form:
        """Other roles follow the user's; their parts are joined to a string where strings work."""
        if (known := self.of_role.get(role)) is not None:
            return known
        user = self.of_role.get("user", Form())
        return Form(not user.wraps_strings, user.wraps_strings)


def prepared(messages: Sequence[Mapping[str, Any]], forms: Forms) -> list[dict[str, Any]]:
    """The messages as transformers passes them to a template: without nulls, with reasoning under
    all its keys, with decoded arguments of tool calls; ``content`` in a form that the template
    supports, and empty where the template cannot do without. Raises RequestError."""
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    return [_prepared(message, f"messages[{i}]", forms) for i, message in enumerate(messages)]


def _prepared(message: Mapping[str, Any], place: str, forms: Forms) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{place}.role must be a string", param="messages")
    result = {key: value for key, value in message.items() if value is not None}
    if "content" in result:
        result["content"] = _content(result["content"], forms[role], f"{place}.content")
    if calls := result.get("tool_calls"):
        if not isinstance(calls, list):
            raise RequestError(f"{place}.tool_calls must be a list", param="messages")
        result["tool_calls"] = [_decoded(call, place) for call in calls]
        if forms.needs_content:
            result.setdefault("content", _content("", forms[role], f"{place}.content"))
    reasoning = next((result[name] for name in _REASONING if name in result), None)
    if reasoning is not None:
        result = {"thinking": reasoning} | result | {"reasoning_content": reasoning}
    return result


def _content(content: Any, form: Form, place: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if form.wraps_strings else content
    if not isinstance(content, list):
        raise RequestError(f"{place} must be a string or a list of text parts", param="messages")
    parts = [_part(part, f"{place}[{i}]") for i, part in enumerate(content)]
    return parts if form.keeps_parts else "".join(part["text"] for part in parts)


def _part(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise RequestError(
            f"{place}: only parts of type 'text' are supported, got {str(kind)[:40]!r}",
            param="messages",
            code="unsupported_parameter",
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{place}.text must be a string", param="messages")
    return dict(part)


def _decoded(call: Any, place: str) -> dict[str, Any]:
    """Templates expect the arguments of a tool call as an object; OpenAI's API has them as a JSON
    string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"{place}.tool_calls: each needs a function", param="messages")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        arguments = msgspec.json.decode(arguments or "{}")
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise RequestError(
            f"{place}.tool_calls: the arguments are not JSON", param="messages"
        ) from None
    return {**call, "function": {**function, "arguments": arguments}}


# -- the last user message ------------------------------------------------------------------------

_NEAR = 4096
"""Characters behind a text within which the next is nearly always: templates write little between
two."""


def lost_user_text(messages: Sequence[Mapping[str, Any]], prompt: str) -> int | None:
    """The index of the last user message if one of its texts is missing in the prompt; else None.
    Templates may trim the text, or write it as JSON."""
    index = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)
    if index is None:
        return None
    place = 0
    for text in _texts(messages[index].get("content", "")):
        if (place := _end_of(text.strip(), prompt, place)) < 0:
            return index
    return None


def _texts(content: str | Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content)


def _end_of(text: str, prompt: str, start: int) -> int:
    """Where a text ends in the prompt, -1 where it is not. Looked for from ``start``, where the one
    before it ended: each from the beginning would be quadratic in the number of texts."""
    for begin, width in ((start, _NEAR), (start, len(prompt)), (0, len(prompt))):
        for form in _forms(text):
            if (at := prompt.find(form, begin, begin + width + len(form))) >= 0:
                return at + len(form)
    return -1


def _forms(text: str) -> Iterator[str]:
    yield text
    for ascii in (False, True):
        yield json.dumps(text, ensure_ascii=ascii)[1:-1]


# -- continuing the last message -------------------------------------------------------------------

_MARK = "CONTINUE-HERE-7c1f "
"""Appended to the last message while it is rendered. The space at its end shows whether the
template strips whitespace."""


def open_ended(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the mark appended to the last one. Raises RequestError."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        content = content + _MARK
    elif content:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + _MARK}]
    else:
        raise RequestError(
            "continue_final_message: the last message has no content to continue",
            param="continue_final_message",
        )
    return [*before, {**last, "content": content}]


def up_to_mark(prompt: str, last: Mapping[str, Any]) -> str:
    """The prompt up to the mark, so that the model continues the message; without the trailing
    whitespace of the message if the template strips it. Raises RequestError when the template
    changes the message."""
    place = prompt.rfind(_MARK.rstrip())
    final = next(reversed(list(_texts(last["content"]))))
    if place < 0 or final.strip() not in prompt:
        raise RequestError(
            "continue_final_message: the chat template drops or changes the last message",
            param="continue_final_message",
        )
    before = prompt[:place] if prompt.startswith(_MARK, place) else prompt[:place].rstrip()
    # a template may write the message twice
    return before.replace(_MARK, "").replace(_MARK.rstrip(), "")
