"""From a user's request to engine requests: prompts become token ids, a request with ``n`` becomes
n engine requests, and invalid requests are refused."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.messages import EngineRequest, SamplingParams, TokenOutput
from vllm_di.errors import RequestError


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | Sequence[int], *, add_special_tokens: bool = True
) -> list[int]:
    """The token ids of a prompt, which is text or a list of token ids. Raises RequestError when it
    is empty."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        ids = list(prompt)
    if not ids:
        raise RequestError("the prompt must not be empty", param="prompt")
    return ids


def failure(output: TokenOutput) -> RequestError:
    """What the engine says in an output with an ``error``."""
    return RequestError(
        output.error or "the engine failed on this request",
        param=output.error_param,
        code=output.error_code,
        status=output.error_status,
    )


def check_token_ids(ids: Collection[int], vocab_size: int, param: str) -> None:
    """Raise RequestError for an id outside the model's vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise RequestError(
            f"{param}: token id {wrong} is outside the vocabulary [0, {vocab_size - 1}]",
            param=param,
        )


def fitted(
    params: SamplingParams,
    num_prompt: int,
    max_model_len: int,
    default_max_tokens: int | None = None,
) -> SamplingParams:
    """``params`` with ``max_tokens`` set: by default the room that is left, at most
    ``default_max_tokens``. Raises RequestError (``context_length_exceeded``) when prompt and output
    do not fit into the context."""
    room = max_model_len - num_prompt
    needed = params.max_tokens or max(params.min_tokens, 1)
    if needed > room:
        name = "min_tokens" if params.max_tokens is None else "max_tokens"
        raise RequestError(
            f"the model's context is {max_model_len} tokens: a prompt of {num_prompt} leaves room "
            f"for {max(room, 0)}, and {needed} are asked for; shorten the prompt"
            + (f" or lower {name}" if room > 0 else ""),
            param=name if room > 0 else "prompt",
            code="context_length_exceeded",
        )
    if params.max_tokens is not None:
        return params
    if default_max_tokens is not None:
        room = min(room, max(default_max_tokens, params.min_tokens))
    return changed(params, max_tokens=room)


def bad_words_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The token ids of each word, at the start of a text and after a space: these differ."""
    variants: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids:
                variants[tuple(ids)] = None
    return [list(ids) for ids in variants]


class Prepared(msgspec.Struct, frozen=True):
    """Sampling parameters that are checked for one model, once for all prompts of a request."""

    params: SamplingParams
    bad_words_token_ids: list[list[int]]


def prepared(tokenizer: Tokenizer, params: SamplingParams, vocab_size: int) -> Prepared:
    """Check ``params``. Raises RequestError for token ids outside the vocabulary."""
    check_token_ids(params.stop_token_ids, vocab_size, "stop_token_ids")
    check_token_ids(params.logit_bias or (), vocab_size, "logit_bias")
    allowed = params.allowed_token_ids
    if allowed is not None:
        check_token_ids(allowed, vocab_size, "allowed_token_ids")
        once = list(dict.fromkeys(allowed))
        if len(once) < len(allowed):
            params = changed(params, allowed_token_ids=once)
    return Prepared(params, bad_words_token_ids(tokenizer, params.bad_words))


def fan_out(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    bad_words: list[list[int]],
    *,
    priority: int,
    cache_salt: str | None,
    arrival_time: float,
) -> list[EngineRequest]:
    """One engine request for each of the ``n`` choices. Choice i has the id ``<id>-<i>`` and the
    seed + i."""
    requests: list[EngineRequest] = []
    single = params if params.n == 1 else changed(params, n=1)
    for i in range(params.n):
        choice_params = single
        if i and params.seed is not None:
            choice_params = changed(single, seed=_wrapped(params.seed + i))
        requests.append(
            EngineRequest(
                request_id=request_id if params.n == 1 else f"{request_id}-{i}",
                prompt_token_ids=prompt_token_ids,
                params=choice_params,
                bad_words_token_ids=bad_words,
                priority=priority,
                arrival_time=arrival_time,
                cache_salt=cache_salt,
            )
        )
    return requests


def changed(params: SamplingParams, **values: Any) -> SamplingParams:
    """A copy with other values, not checked again. It shares its lists with the original."""
    copied = copy.copy(params)
    for name, value in values.items():
        msgspec.structs.force_setattr(copied, name, value)
    return copied


def _wrapped(seed: int) -> int:
    """Wrap around to a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
