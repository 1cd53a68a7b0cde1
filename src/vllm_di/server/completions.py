"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.answer import OpenAiAnswer
from vllm_di.server.logprobs import LegacyLogprobs, joined, prompt_logprobs
from vllm_di.server.protocol import CompletionRequest, sampling_params
from vllm_di.server.service import Service, new_id

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def start_completion(
    service: Service, request: CompletionRequest
) -> tuple[list[Generation], CompletionAnswer]:
    """Check a decoded request and tokenise its prompts, one generation for each. Raises
    RequestError."""
    service.check_model(request.model)
    prompts = _prompts(request.prompt)
    max_choices = service.config.max_queue
    if len(prompts) * max(request.n or 1, 1) > max_choices:
        raise RequestError(
            f"one request may ask for {max_choices} choices (prompts times n), got {len(prompts)} "
            f"prompts and n={request.n or 1}",
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
    echoed: list[str] = []
    for i, prompt in enumerate(prompts):
        own_id = request_id if len(prompts) == 1 else f"{request_id}-{i}"
        generations.append(
            await service.start(own_id, prompt, prepared, request, add_special_tokens=special)
        )
        if request.echo:
            text = prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)
            echoed.append(text)
        await asyncio.sleep(0)  # many prompts take long: let other requests run
    answer = CompletionAnswer(
        request,
        num_each=len(generations[0].requests),
        echoed=echoed if request.echo else None,
        skip_special_tokens=params.skip_special_tokens,
        echo_only=echo_only,
        request_id=request_id,
        model=service.config.name,
        tokenizer=service.tokenizer,
        prompts=[generation.prompt_token_ids for generation in generations],
    )
    return generations, answer


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """``prompt`` is one prompt or a list of them, each as text or as token ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        what = "must not be empty" if not kinds else "must not mix text and token ids"
        raise RequestError(f"prompt {what}", param="prompt")
    return [prompt] if kinds == {int} else prompt


class CompletionAnswer(OpenAiAnswer):
    """A ``text_completion``, or its chunks. Choice ``i * n + j`` is choice j of prompt i."""

    OBJECT = EVENT_OBJECT = "text_completion"

    def __init__(
        self,
        request: CompletionRequest,
        *,
        num_each: int,
        echoed: Sequence[str] | None,
        skip_special_tokens: bool,
        echo_only: bool,
        **common: Any,
    ) -> None:
        """``num_each``: choices of a prompt. ``echoed``: texts of the prompts, to stand before
        their choices. ``echo_only``: the one token that the engine must generate is not shown."""
        super().__init__(request, **common)
        self._echoed = echoed
        self._echo_only = echo_only
        self._has_logprobs = request.logprobs is not None
        self._num_each = num_each
        self._choices = [
            _Choice(
                LegacyLogprobs(
                    self._tokenizer,
                    has_top=bool(request.logprobs),
                    prompt_token_ids=prompt,
                    skip_special_tokens=skip_special_tokens,
                )
            )
            for prompt in self._prompts
            for _ in range(self._num_each)
        ]

    def events(self, position: int, update: Update) -> bytes:
        update = self._shown(position, update)
        index = position * self._num_each + update.index
        text, logprobs = self._piece(position, self._choices[index], update)
        token_ids = update.token_ids
        shows_nothing = not text and logprobs is None and not (self._with_token_ids and token_ids)
        if shows_nothing and update.finish_reason is None:
            return b""
        entry = b'{"index":%d,"text":%b' % (index, orjson.dumps(text))
        entry += b',"logprobs":' + orjson.dumps(logprobs)
        if self._with_token_ids:
            entry += b',"token_ids":' + orjson.dumps(token_ids)
        if update.finish_reason is None:
            return self._event(entry + b',"finish_reason":null}')
        entry += b',"finish_reason":"%b"' % update.finish_reason.encode()
        return self._event(entry + b',"stop_reason":' + orjson.dumps(update.stop_reason) + b"}")

    def add(self, position: int, update: Update) -> None:
        update = self._shown(position, update)
        choice = self._choices[position * self._num_each + update.index]
        text, logprobs = self._piece(position, choice, update)
        choice.texts.append(text)
        choice.token_ids += update.token_ids
        if logprobs is not None:
            choice.add_logprobs(logprobs)
        if update.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = update.finish_reason, update.stop_reason

    def choices(self) -> list[dict[str, Any]]:
        entries = []
        for index, choice in enumerate(self._choices):
            position = index // self._num_each
            entry = {
                "index": index,
                "text": "".join(choice.texts),
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "prompt_logprobs": prompt_logprobs(
                    self._tokenizer, self._prompt_logprobs[position]
                ),
            }
            if self._with_token_ids:
                entry["token_ids"] = choice.token_ids
                entry["prompt_token_ids"] = self._prompts[position]
            entries.append(entry)
        return entries

    def _shown(self, position: int, update: Update) -> Update:
        """The update without the token that ``echo_only`` hides; usage does not count it."""
        if self._echo_only:
            update = msgspec.structs.replace(update, text="", token_ids=[], logprobs=None)
        self._note(position, update)
        return update

    def _piece(
        self, position: int, choice: _Choice, update: Update
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and logprobs of one update; the echoed prompt comes before the first."""
        if not self._has_logprobs and self._echoed is None:
            return update.text, None
        prompt, pieces = "", []
        if self._echoed is not None and not choice.has_begun:
            choice.has_begun = True
            prompt, entries = self._echoed[position], self._prompt_logprobs[position]
            if self._has_logprobs and entries is not None:
                pieces.append(choice.legacy.prompt(self._prompts[position], entries, prompt))
        if self._has_logprobs and update.logprobs:
            pieces.append(choice.legacy.piece(update.logprobs))
        if not pieces:
            return prompt + update.text, None
        return prompt + update.text, pieces[0] if len(pieces) == 1 else joined(*pieces)


class _Choice:
    """What one choice has generated so far."""

    def __init__(self, legacy: LegacyLogprobs) -> None:
        self.legacy = legacy
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.has_begun = False

    def add_logprobs(self, piece: dict[str, Any]) -> None:
        """Append in place: joining anew would copy the whole for each token."""
        if self.logprobs is None:
            self.logprobs = piece
            return
        for name, values in piece.items():
            if values is not None:
                self.logprobs[name] += values
