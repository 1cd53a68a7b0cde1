"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import orjson

from vllm_di.components.interfaces import ParserRequest, ToolParser
from vllm_di.components.messages import MAX_LOGPROBS, TokenLogprobs
from vllm_di.components.tool_parser.asked import read_tools
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.answer import OpenAiAnswer
from vllm_di.server.logprobs import chat_logprobs, prompt_logprobs
from vllm_di.server.parsing import ChoiceParser, MessageDelta, MessageParts, wants_tools
from vllm_di.server.protocol import ChatRequest, sampling_params
from vllm_di.server.required import RequiredCalls
from vllm_di.server.service import Service, new_id
from vllm_di.server.thought import template_kwargs, with_thought


async def start_chat(service: Service, request: ChatRequest) -> tuple[list[Generation], ChatAnswer]:
    """Check a decoded request, render and tokenise its prompt. Raises RequestError."""
    generation, parsers = await begin_chat(service, request, "chatcmpl")
    answer = ChatAnswer(
        request,
        parsers=parsers,
        request_id=generation.request_id,
        model=service.config.name,
        tokenizer=service.tokenizer,
        prompts=[generation.prompt_token_ids],
    )
    return [generation], answer


async def begin_chat(
    service: Service, request: ChatRequest, prefix: str
) -> tuple[Generation, list[ChoiceParser]]:
    """A generation, and a parser for each of its choices. ``prefix``: of the request's id. Raises
    RequestError."""
    fields = check_chat(service, request)
    limit = request.max_completion_tokens
    params = sampling_params(
        request,
        logprobs=_num_logprobs(request),
        max_tokens=request.max_tokens if limit is None else limit,
        defaults=service.config.sampling,
    )
    tool_parser: ToolParser | None = service.tool_parser if wants_tools(request) else None
    asked = read_tools(fields) if request.tool_choice not in (None, "auto", "none") else None
    if asked is not None and asked.choice in ("required", "named"):
        if params.structured_output is not None:
            raise RequestError(
                "tool_choice makes the answer a call, and another constraint is asked for as well: "
                "leave one out",
                param="tool_choice",
            )
        tool_parser = required = RequiredCalls(asked)
        params = msgspec.structs.replace(params, structured_output={"tools": required.constraint()})
    prompt = await render_chat(service, request)
    parser_request = ParserRequest(fields, prompt)
    params, may_think = with_thought(
        params, request, service.reasoning_parser, parser_request, service.tokenizer
    )
    parsers = (service.reasoning_parser if may_think else None, tool_parser)
    if request.skip_special_tokens is None and any(p and p.needs_special_tokens for p in parsers):
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    generation = await service.start(
        new_id(prefix),
        prompt,
        params,
        request,
        add_special_tokens=bool(request.add_special_tokens),  # the template writes those it wants
    )
    parallel = request.parallel_tool_calls is not False
    return generation, [
        ChoiceParser(*parsers, parser_request, parallel=parallel) for _ in generation.requests
    ]


def check_chat(service: Service, request: ChatRequest) -> Mapping[str, Any]:
    """The fields of a request for this model whose tools and reasoning the parsers accept. Raises
    RequestError."""
    service.check_model(request.model)
    fields: Mapping[str, Any] = msgspec.structs.asdict(request)
    service.tool_parser.check(fields)
    service.reasoning_parser.check(fields)
    return fields


async def render_chat(service: Service, request: ChatRequest) -> str:
    """The prompt. Raises RequestError."""
    return await service.render(
        request.messages,
        tools=request.tools,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        kwargs=template_kwargs(request),
    )


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


class ChatAnswer(OpenAiAnswer):
    """A ``chat.completion``, or its chunks."""

    OBJECT, EVENT_OBJECT = "chat.completion", "chat.completion.chunk"

    def __init__(
        self, request: ChatRequest, *, parsers: Sequence[ChoiceParser], **common: Any
    ) -> None:
        super().__init__(request, **common)
        self._choices = [ChatChoice(parser) for parser in parsers]
        self._has_logprobs = bool(request.logprobs)

    def events(self, position: int, update: Update) -> bytes:
        self._note(position, update)
        index, choice = update.index, self._choices[update.index]
        data = b""
        if not choice.has_begun:
            choice.has_begun = True
            data = self._delta_event(index, b'{"role":"assistant","content":""}', self._first())
        delta = choice.parse(update).fields()
        extra = b""
        if self._has_logprobs and update.logprobs:
            shape = chat_logprobs(self._tokenizer, update.logprobs)
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
        return data + self._delta_event(index, orjson.dumps(delta), extra, reason)

    def add(self, position: int, update: Update) -> None:
        self._note(position, update)
        choice = self._choices[update.index]
        choice.parts.add(choice.parse(update))
        choice.token_ids += update.token_ids
        choice.logprobs += update.logprobs or ()

    def choices(self) -> list[dict[str, Any]]:
        entries = []
        for index, choice in enumerate(self._choices):
            logprobs = (
                chat_logprobs(self._tokenizer, choice.logprobs) if self._has_logprobs else None
            )
            entry = {
                "index": index,
                "message": choice.parts.message(),
                "logprobs": logprobs,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            if self._with_token_ids:
                entry["token_ids"] = choice.token_ids
            entries.append(entry)
        return entries

    def body(self) -> dict[str, Any]:
        body = super().body()
        body["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._prompt_logprobs[0])
        if self._with_token_ids:
            body["prompt_token_ids"] = self._prompts[0]
        return body

    def _delta_event(
        self, index: int, delta: bytes, extra: bytes, reason: bytes = b"null"
    ) -> bytes:
        return self._event(
            b'{"index":%d,"delta":%b,"finish_reason":%b%b}' % (index, delta, reason, extra)
        )

    def _first(self) -> bytes:
        """vLLM's extension: the prompt's token ids come with the first event."""
        if not self._with_token_ids:
            return b""
        return b',"prompt_token_ids":' + orjson.dumps(self._prompts[0])


class ChatChoice:
    """What one choice has generated so far."""

    def __init__(self, parser: ChoiceParser) -> None:
        self.parts = MessageParts()
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.has_begun = False
        self._parser = parser

    def parse(self, update: Update) -> MessageDelta:
        reason = update.finish_reason
        delta = self._parser.feed(update.text, is_last=reason is not None)
        if reason is not None:
            # A choice that was cut off may end inside a call: its own reason must stay visible.
            called = reason == "stop" and self._parser.num_calls > 0
            self.finish_reason = "tool_calls" if called else reason
            self.stop_reason = update.stop_reason
        return delta
