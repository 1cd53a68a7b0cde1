"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from vllm_di.components.messages import TokenLogprobs
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.answer import Answer
from vllm_di.server.logprobs import LegacyLogprobs, joined, prompt_logprobs
from vllm_di.server.protocol import CompletionRequest, sampling_params
from vllm_di.server.service import Service, new_id

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def start_completion(service: Service, request: CompletionRequest) -> Answer:
    """From a decoded request to its generations, one for each prompt. Raises RequestError."""
    service.check_model(request.model)
    prompts = _prompts(request.prompt)
    most = service.config.max_queue
    if len(prompts) * max(request.n or 1, 1) > most:
        raise RequestError(
            f"one request may ask for {most} texts (prompts times n), got {len(prompts)} prompts "
            f"and n={request.n or 1}",
            param="prompt",
        )
    echo_only = bool(request.echo) and request.max_tokens == 0
    limit = request.max_tokens
    if limit is None and service.default_max_tokens is None:
        limit = _DEFAULT_MAX_TOKENS
    params = sampling_params(
        request,
        logprobs=request.logprobs,
        max_tokens=1 if echo_only else limit,
        defaults=service.config.sampling,
    )
    if request.echo and request.logprobs is not None and params.prompt_logprobs is None:
        params = msgspec.structs.replace(params, prompt_logprobs=request.logprobs)
    prepared = service.processor.prepare(params)
    special = request.add_special_tokens is not False
    request_id = new_id("cmpl")
    generations: list[Generation] = []
    for i, prompt in enumerate(prompts):
        own_id = request_id if len(prompts) == 1 else f"{request_id}-{i}"
        generations.append(
            await service.start(own_id, prompt, prepared, request, add_special_tokens=special)
        )
        await asyncio.sleep(0)  # many prompts take long; let streams go on
    return CompletionAnswer(service, request, request_id, generations, echo_only=echo_only)


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids -> a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        what = "must not be empty" if not kinds else "must not mix texts and token ids"
        raise RequestError(f"prompt {what}", param="prompt")
    return [prompt] if kinds == {int} else prompt


class CompletionAnswer(Answer):
    """A ``text_completion``, or its chunks. Choice ``i * n + j`` is text j of prompt i."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        request_id: str,
        generations: Sequence[Generation],
        *,
        echo_only: bool,
    ) -> None:
        super().__init__(service, request, generations)
        self._request_id = request_id
        self._num_each = len(generations[0].requests)
        self._echo = bool(request.echo)
        self._echo_only = echo_only
        self._has_logprobs = request.logprobs is not None
        self._with_token_ids = bool(request.return_token_ids)
        self._created = int(time.time())
        self._choices = [
            _Choice(
                LegacyLogprobs(
                    service.tokenizer,
                    has_top=bool(request.logprobs),
                    prompt_token_ids=generation.prompt_token_ids,
                    skip_special_tokens=generation.params.skip_special_tokens,
                )
            )
            for generation in generations
            for _ in generation.requests
        ]
        common: dict[str, Any] = {"id": request_id, "object": "text_completion"}
        common |= {"created": self._created, "model": service.config.name}
        self._head = b"data: " + orjson.dumps(common)[:-1] + b',"choices":['

    def events(self, position: int, update: Update) -> bytes:
        index = position * self._num_each + update.index
        choice = self._choices[index]
        text, logprobs = self._piece(position, choice, update)
        is_empty = not text and logprobs is None and not (self._with_token_ids and update.token_ids)
        if is_empty and update.finish_reason is None:
            return b""
        entry = b'{"index":%d,"text":%b' % (index, orjson.dumps(text))
        entry += b',"logprobs":' + orjson.dumps(logprobs)
        if self._with_token_ids:
            entry += b',"token_ids":' + orjson.dumps(self._token_ids(update))
        if update.finish_reason is None:
            entry += b',"finish_reason":null}]'
        else:
            entry += b',"finish_reason":"%b"' % update.finish_reason.encode()
            entry += b',"stop_reason":' + orjson.dumps(update.stop_reason) + b"}]"
        return self._head + entry + self._end_of_event()

    def closing_events(self) -> bytes:
        if not self._wants_usage:
            return b""
        return self._head + b'],"usage":' + orjson.dumps(self.usage()) + b"}\n\n"

    def take(self, position: int, update: Update) -> None:
        choice = self._choices[position * self._num_each + update.index]
        text, logprobs = self._piece(position, choice, update)
        choice.texts.append(text)
        choice.token_ids += self._token_ids(update)
        if logprobs is not None:
            choice.add_logprobs(logprobs)
        if update.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = update.finish_reason, update.stop_reason

    def body(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self._choices):
            generation = self.generations[index // self._num_each]
            entry = {
                "index": index,
                "text": "".join(choice.texts),
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "prompt_logprobs": prompt_logprobs(
                    self.service.tokenizer, generation.prompt_logprobs
                ),
            }
            if self._with_token_ids:
                entry |= {
                    "token_ids": choice.token_ids,
                    "prompt_token_ids": generation.prompt_token_ids,
                }
            choices.append(entry)
        return {
            "id": self._request_id,
            "object": "text_completion",
            "created": self._created,
            "model": self.service.config.name,
            "choices": choices,
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        usage = super().usage()
        if self._echo_only:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _token_ids(self, update: Update) -> list[int]:
        return [] if self._echo_only else update.token_ids

    def _piece(
        self, position: int, choice: _Choice, update: Update
    ) -> tuple[str, dict[str, Any] | None]:
        """The text and log-probabilities of one update, the echoed prompt before the first."""
        text = "" if self._echo_only else update.text
        entries: Sequence[TokenLogprobs] = () if self._echo_only else update.logprobs or ()
        is_first = self._echo and not choice.has_begun
        choice.has_begun = True
        generation = self.generations[position]
        prompt = self._prompt_text(generation) if is_first else ""
        text = prompt + text
        if not self._has_logprobs:
            return text, None
        parts = []
        if is_first and generation.prompt_logprobs is not None:
            ids = generation.prompt_token_ids
            parts.append(choice.legacy.prompt(ids, generation.prompt_logprobs, prompt))
        if entries:
            parts.append(choice.legacy.piece(entries))
        if not parts:
            return text, None
        return text, parts[0] if len(parts) == 1 else joined(*parts)

    def _prompt_text(self, generation: Generation) -> str:
        if generation.prompt is not None:
            return generation.prompt
        return self.service.tokenizer.decode(generation.prompt_token_ids)


class _Choice:
    """What has come of one text."""

    def __init__(self, legacy: LegacyLogprobs) -> None:
        self.legacy = legacy
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.has_begun = False

    def add_logprobs(self, piece: dict[str, Any]) -> None:
        """At the end of what is there: joining anew would copy the whole for each token."""
        if self.logprobs is None:
            self.logprobs = piece
            return
        for name, values in piece.items():
            if values is not None:
                self.logprobs[name] += values
