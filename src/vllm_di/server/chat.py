"""``POST /v1/chat/completions``."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import orjson

from vllm_di.components.interfaces import ReasoningParser, ToolParser
from vllm_di.components.messages import MAX_LOGPROBS, TokenLogprobs
from vllm_di.components.reasoning_parser.none import NoReasoningParser
from vllm_di.components.tool_parser.none import NoToolParser
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.answer import Answer
from vllm_di.server.logprobs import chat_logprobs, prompt_logprobs
from vllm_di.server.protocol import ChatRequest, sampling_params
from vllm_di.server.service import Service, new_id


async def start_chat(service: Service, request: ChatRequest) -> Answer:
    """From a decoded request to its generation. Raises RequestError."""
    service.check_model(request.model)
    fields: Mapping[str, Any] = msgspec.structs.asdict(request)
    service.tool_parser.check(fields)
    service.reasoning_parser.check(fields)
    limit = request.max_completion_tokens
    params = sampling_params(
        request,
        logprobs=_num_logprobs(request),
        max_tokens=request.max_tokens if limit is None else limit,
        defaults=service.config.sampling,
    )
    prompt = await service.render(
        request.messages,
        tools=request.tools,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        kwargs=request.chat_template_kwargs,
    )
    generation = await service.start(
        new_id("chatcmpl"),
        prompt,
        params,
        request,
        add_special_tokens=bool(request.add_special_tokens),  # the template writes them
    )
    return ChatAnswer(service, request, generation)


def _num_logprobs(request: ChatRequest) -> int | None:
    top = request.top_logprobs
    if not request.logprobs:
        if top:
            raise RequestError("top_logprobs goes only with logprobs=true", param="top_logprobs")
        return None
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be in [0, {MAX_LOGPROBS}], got {top}", param="top_logprobs"
        )
    return top or 0


class ChatAnswer(Answer):
    """A ``chat.completion``, or its chunks."""

    def __init__(self, service: Service, request: ChatRequest, generation: Generation) -> None:
        super().__init__(service, request, [generation])
        self._generation = generation
        self._choices = [_Choice() for _ in generation.requests]
        self._has_logprobs = bool(request.logprobs)
        self._with_token_ids = bool(request.return_token_ids)
        self._parses_text = not _passes_through(service.tool_parser, service.reasoning_parser)
        self._created = int(time.time())
        common: dict[str, Any] = {"id": generation.request_id, "object": "chat.completion.chunk"}
        common |= {"created": self._created, "model": service.config.name}
        self._head = b"data: " + orjson.dumps(common)[:-1] + b',"choices":['

    def events(self, position: int, update: Update) -> bytes:
        choice = self._choices[update.index]
        data = b""
        if not choice.has_begun:
            choice.has_begun = True
            data = self._event(update.index, b'{"role":"assistant","content":""}', self._first())
        delta = self._delta(choice, update)
        extra = b""
        if self._has_logprobs and update.logprobs:
            shape = chat_logprobs(self.service.tokenizer, update.logprobs)
            extra = b',"logprobs":' + orjson.dumps(shape)
        if self._with_token_ids and update.token_ids:
            extra += b',"token_ids":' + orjson.dumps(update.token_ids)
        if update.finish_reason is None:
            if delta == b"{}" and not extra:
                return data
            reason = b"null"
        else:
            reason = (
                b'"tool_calls"' if choice.called_tools else b'"%s"' % update.finish_reason.encode()
            )
            extra += b',"stop_reason":' + orjson.dumps(update.stop_reason)
        return data + self._event(update.index, delta, extra, reason)

    def closing_events(self) -> bytes:
        if not self._wants_usage:
            return b""
        return self._head + b'],"usage":' + orjson.dumps(self.usage()) + b"}\n\n"

    def take(self, position: int, update: Update) -> None:
        self._choices[update.index].add(update)

    def body(self) -> dict[str, Any]:
        tokenizer = self.service.tokenizer
        choices = []
        for index, choice in enumerate(self._choices):
            message = self._message("".join(choice.texts))
            logprobs = chat_logprobs(tokenizer, choice.logprobs) if self._has_logprobs else None
            entry = {
                "index": index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": "tool_calls" if "tool_calls" in message else choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            if self._with_token_ids:
                entry["token_ids"] = choice.token_ids
            choices.append(entry)
        body = {
            "id": self._generation.request_id,
            "object": "chat.completion",
            "created": self._created,
            "model": self.service.config.name,
            "choices": choices,
            "usage": self.usage(),
            "prompt_logprobs": prompt_logprobs(tokenizer, self._generation.prompt_logprobs),
        }
        if self._with_token_ids:
            body["prompt_token_ids"] = self._generation.prompt_token_ids
        return body

    def _event(self, index: int, delta: bytes, extra: bytes, reason: bytes = b"null") -> bytes:
        choice = b'{"index":%d,"delta":%b,"finish_reason":%b%b}]' % (index, delta, reason, extra)
        return self._head + choice + self._end_of_event()

    def _first(self) -> bytes:
        """vLLM's extension: the prompt's ids come with the first event."""
        if not self._with_token_ids:
            return b""
        return b',"prompt_token_ids":' + orjson.dumps(self._generation.prompt_token_ids)

    def _delta(self, choice: _Choice, update: Update) -> bytes:
        """Text passes at once; a parser judges whole texts, so with one it waits for the end."""
        if not self._parses_text:
            return b'{"content":' + orjson.dumps(update.text) + b"}" if update.text else b"{}"
        choice.texts.append(update.text)
        if update.finish_reason is None:
            return b"{}"
        delta = self._message("".join(choice.texts))
        choice.called_tools = "tool_calls" in delta
        calls = delta.get("tool_calls", [])
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        return orjson.dumps({k: v for k, v in delta.items() if k not in ("role", "refusal")})

    def _message(self, text: str) -> dict[str, Any]:
        reasoning, answer = self.service.reasoning_parser.parse(text)
        content, calls = self.service.tool_parser.parse(answer)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message


class _Choice:
    """What has come of one text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.has_begun = False
        self.called_tools = False

    def add(self, update: Update) -> None:
        self.texts.append(update.text)
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs or ()
        if update.finish_reason is not None:
            self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason


def _passes_through(tool_parser: ToolParser, reasoning_parser: ReasoningParser) -> bool:
    """Whether neither parser changes the text, so that it can be streamed as it comes."""
    plain: Sequence[tuple[Any, Any]] = (
        (tool_parser, NoToolParser),
        (reasoning_parser, NoReasoningParser),
    )
    return all(inspect.unwrap(type(parser).parse) is none.parse for parser, none in plain)
