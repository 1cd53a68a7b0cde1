"""Twelve conversations, in the form that Hugging Face documents, and transformers' prompts for
them: what ours must equal, byte for byte."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Case:
    """One conversation and the arguments of its rendering."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SYSTEM = {"role": "system", "content": "You are terse."}
HELLO = [_user("What is 2+2?"), _assistant("4."), _user("And 3+3?")]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather of a <city> & its "surroundings".',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Größe: Zürich, 東京"},
                "days": {"type": "integer", "minimum": 1, "default": 2},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "exact": {"type": "number", "maximum": 1.0},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "exact": 1.0}},
}
RESULT = {
    "role": "tool",
    "tool_call_id": "call00001",
    "name": "get_weather",
    "content": '{"temperature": 21.5, "sky": "clear"}',
}

CASES: dict[str, Case] = {
    "plain": Case([_user("What is 2+2?")]),
    "system": Case([SYSTEM, _user("What is 2+2?")]),
    "turns": Case([SYSTEM, *HELLO]),
    "parts": Case([_user(_text("What is ", "2+2?"))]),
    "tools": Case([SYSTEM, _user("Weather in Zürich?")], tools=[WEATHER]),
    "calls": Case(
        [_user("Weather in Zürich?"), _assistant(None, tool_calls=[CALL]), RESULT], tools=[WEATHER]
    ),
    "after calls": Case(
        [
            SYSTEM,
            _user("Weather in Zürich?"),
            _assistant("Let me look.", tool_calls=[CALL]),
            RESULT,
            _assistant("21.5 degrees."),
            _user("Thanks!"),
        ],
        tools=[WEATHER],
    ),
    "reasoning": Case(
        [
            _user("What is 2+2?"),
            _assistant("4.", reasoning_content="Two and two.\nEasy."),
            _user("And 3+3?"),
        ],
    ),
    "empty": Case(
        [{"role": "system", "content": ""}, _user("Hi"), _assistant(""), _user("Hello?")]
    ),
    "unicode": Case([_user("  naïve 你好 🙂\n\n<|im_end|> {{ x }} </think> \"q\" 'q' \\n <&> \n")]),
    "continued": Case(
        [_user("Count to five."), _assistant("1, 2, 3, ")],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "closed": Case(HELLO[:2], add_generation_prompt=False, kwargs={"enable_thinking": False}),
}


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS)


def expected(source: str, case: Case) -> str | None:
    """Transformers' prompt for the case. Where the last user message does not come through, parts
    are joined, and strings made parts for a template that keeps no string. None where transformers
    raises or loses that message all the same."""
    tried = [case.messages]
    if any(isinstance(message["content"], list) for message in case.messages):
        tried.append([_joined(message) for message in case.messages])
    elif not any(_prompt(source, c, c.messages) for n, c in CASES.items() if n != "parts"):
        tried.append([_wrapped(message) for message in case.messages])
    prompts = (_prompt(source, case, messages) for messages in tried)
    return next((prompt for prompt in prompts if prompt is not None), None)


def _prompt(source: str, case: Case, messages: list[dict[str, Any]]) -> str | None:
    try:
        prompt = apply(source, case, messages)
    except Exception:  # a template may raise anything
        return None
    for tag in ("CONTINUE_FINAL_MESSAGE_TAG ", "CONTINUE_FINAL_MESSAGE_TAG"):
        prompt = prompt.replace(tag, "")  # left where a template writes the message twice
    written_out = any(mark in prompt for mark in ("'type': 'text'", '"type": "text"'))
    kept = all(
        text.strip() in prompt or json.dumps(text.strip(), ensure_ascii=False)[1:-1] in prompt
        for text in _last_user_texts(messages)
    )
    return prompt if kept and not written_out else None


def apply(source: str, case: Case, messages: list[dict[str, Any]]) -> str:
    """``apply_chat_template``. Raises whatever it raises."""
    text: str = _tokenizer().apply_chat_template(
        copy.deepcopy(messages),
        tools=case.tools,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=case.add_generation_prompt,
        continue_final_message=case.continue_final_message,
        **case.kwargs,
    )
    return text


def as_client(case: Case) -> list[dict[str, Any]]:
    """The messages as OpenAI's clients send them: a tool call's arguments are JSON text."""
    messages = copy.deepcopy(case.messages)
    for message in messages:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    is_list = isinstance(content, list)
    return {**message, "content": "".join(p["text"] for p in content)} if is_list else message


def _wrapped(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": _text(content)} if isinstance(content, str) else message


def _last_user_texts(messages: list[dict[str, Any]]) -> list[str]:
    content = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    return [content] if isinstance(content, str) else [part["text"] for part in content]
