"""Refuses settings that do not fit a platform, and a request that can never run, before it takes a
place in the queue."""

from __future__ import annotations

from collections.abc import Collection

from vllm_di.components.interfaces import Drafter
from vllm_di.components.messages import EngineRequest, WorkerReport
from vllm_di.components.scheduler.step import StepLimits
from vllm_di.errors import ConfigError, RequestError


def check_settings(
    report: WorkerReport,
    drafter: Drafter,
    limits: StepLimits,
    max_num_seqs: int,
    max_step_ms: float | None,
) -> None:
    """Raises ConfigError."""
    if not limits.chunks_prompts and limits.max_tokens < report.max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens ({limits.max_tokens}) must hold a whole prompt of "
            f"{report.max_model_len} tokens on a platform without chunked prefill, and "
            "of a model whose tokens see those behind them"
        )
    if limits.max_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({limits.max_tokens}) must be at least "
            f"max_num_seqs ({max_num_seqs}): each decoding sequence takes one token"
        )
    if drafter.max_drafts and not report.limits.drafts:
        raise ConfigError(
            f"{type(drafter).__name__} needs a platform that checks several tokens of a "
            "sequence in a step, and this one has limits.drafts=false; take drafter=none",
            key="drafter",
        )
    if report.prefill_depth and max_step_ms is not None:
        raise ConfigError(
            f"max_step_ms ({max_step_ms:g}) bounds steps that prompts share with decodes, and "
            "here they run on workers of their own; set it to null"
        )


def validate(
    request: EngineRequest, report: WorkerReport, num_usable_blocks: int, max_chunk: int
) -> int:
    """-> the most tokens that the request may generate; ``max_chunk``: tokens of a step at most.
    Raises RequestError."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    if request.pools or report.pooling is not None:
        return _validate_pooled(request, report, num_usable_blocks, max_chunk)
    if len(prompt) >= report.max_model_len:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; the context is {report.max_model_len} tokens, "
            "prompt and answer together",
            param="prompt",
            code="context_length_exceeded",
        )
    _in_vocabulary("prompt", prompt, report.vocab_size)
    _in_vocabulary("stop_token_ids", params.stop_token_ids, report.vocab_size)
    _in_vocabulary("allowed_token_ids", params.allowed_token_ids or (), report.vocab_size)
    _in_vocabulary("logit_bias", params.logit_bias or (), report.vocab_size)
    for words in request.bad_words_token_ids:
        _in_vocabulary("bad_words", words, report.vocab_size)
    room = report.max_model_len - len(prompt)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    _in_vocabulary("generated_token_ids", request.generated_token_ids, report.vocab_size)
    if len(request.generated_token_ids) >= max_tokens:
        raise RequestError(
            f"generated_token_ids: {len(request.generated_token_ids)} tokens, and at most "
            f"{max_tokens} are asked for",
            param="generated_token_ids",
        )
    length = len(prompt) + max_tokens
    blocks = sum(g.most_blocks(length, max_chunk, report.block_size) for g in report.kv_groups)
    if blocks > num_usable_blocks:
        raise RequestError(
            f"{len(prompt)} prompt tokens and up to {max_tokens} more need {blocks} blocks of the "
            f"KV cache, which has {num_usable_blocks}; ask for fewer max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return max_tokens


def _validate_pooled(
    request: EngineRequest, report: WorkerReport, num_usable_blocks: int, max_chunk: int
) -> int:
    """As ``validate``, where the request or the model pools; no token is generated: 0."""
    prompt = request.prompt_token_ids
    if report.pooling is None:
        raise RequestError("the model generates text, and is not set up to pool", param="model")
    if not request.pools:
        raise RequestError("the model makes embeddings or scores, and no text", param="model")
    if len(prompt) > report.max_model_len:
        raise RequestError(
            f"the text has {len(prompt)} tokens; the context is {report.max_model_len} tokens",
            param="input",
            code="context_length_exceeded",
        )
    _in_vocabulary("input", prompt, report.vocab_size)
    types, known = request.token_type_ids, report.pooling.token_types
    if types and (len(types) != len(prompt) or min(types) < 0 or max(types) >= known):
        raise RequestError(
            f"token_type_ids: expected one for each of {len(prompt)} tokens, below {known}",
            param="input",
        )
    groups, size = report.kv_groups, report.block_size
    blocks = sum(group.most_blocks(len(prompt), max_chunk, size) for group in groups)
    if blocks > num_usable_blocks:
        raise RequestError(
            f"{len(prompt)} tokens need {blocks} blocks of the KV cache, which has "
            f"{num_usable_blocks}",
            param="input",
            code="context_length_exceeded",
        )
    return 0


def _in_vocabulary(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"{name}: token id {wrong} is outside the vocabulary [0, {vocab_size})", param=name
        )
