"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from vllm_di.components.interfaces import ParserEvent, ParserRequest
from vllm_di.components.messages import MAX_LOGPROBS, TokenLogprobs
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.answer import Answer
from vllm_di.server.logprobs import chat_logprobs, prompt_logprobs
from vllm_di.server.parsing import ChoiceParser, MessageParts, wants_tools
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
    tool_parser = service.tool_parser if wants_tools(request) else None
    parsers = (service.reasoning_parser, tool_parser)
    if request.skip_special_tokens is None and any(p and p.needs_special_tokens for p in parsers):
        params = msgspec.structs.replace(params, skip_special_tokens=False)
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
    parser_request = ParserRequest(fields, prompt)
    choices = [_Choice(ChoiceParser(*parsers, parser_request)) for _ in generation.requests]
    return ChatAnswer(service, request, generation, choices)


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

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        generation: Generation,
        choices: list[_Choice],
    ) -> None:
        super().__init__(service, request, [generation])
        self._generation = generation
        self._choices = choices
        self._has_logprobs = bool(request.logprobs)
        self._with_token_ids = bool(request.return_token_ids)
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
        delta = choice.delta(update)
        extra = b""
        if self._has_logprobs and update.logprobs:
            shape = chat_logprobs(self.service.tokenizer, update.logprobs)
            extra = b',"logprobs":' + orjson.dumps(shape)
        if self._with_token_ids and update.token_ids:
            extra += b',"token_ids":' + orjson.dumps(update.token_ids)
        if update.finish_reason is None:
            if not delta and not extra:
                return data
            reason = b"null"
        else:
            reason = orjson.dumps(choice.finish_reason)
            extra += b',"stop_reason":' + orjson.dumps(update.stop_reason)
        return data + self._event(update.index, orjson.dumps(delta), extra, reason)

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
            logprobs = chat_logprobs(tokenizer, choice.logprobs) if self._has_logprobs else None
            entry = {
                "index": index,
                "message": choice.parts.message(),
                "logprobs": logprobs,
                "finish_reason": choice.finish_reason,
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


class _Choice:
    """What has come of one text."""

    def __init__(self, parser: ChoiceParser) -> None:
        self.parts = MessageParts()
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.has_begun = False
        self._parser = parser

    def delta(self, update: Update) -> dict[str, Any]:
        """What an update adds to the message."""
        parts = MessageParts()
        parts.add(self._parse(update))
        return parts.delta()

    def add(self, update: Update) -> None:
        """Keep what an update adds."""
        self.parts.add(self._parse(update))
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs or ()

    def _parse(self, update: Update) -> list[ParserEvent]:
        reason = update.finish_reason
        events = self._parser.feed(update.text, is_last=reason is not None)
        if reason is not None:
            # A text that was cut off may have cut a call, and the client must see that.
            called = reason == "stop" and self._parser.num_calls > 0
            self.finish_reason = "tool_calls" if called else reason
            self.stop_reason = update.stop_reason
        return events
