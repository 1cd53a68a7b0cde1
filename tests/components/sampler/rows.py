"""Rows for sampler tests, and what a row should come to, worked out one logit at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.interfaces import OpTable, SequenceState
from vllm_di.components.messages import SampledTokens, SamplingParams, TokenLogprobs
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.sampler.standard import StandardSampler

NEVER = -math.inf


def row(
    seq_id: int = 0,
    prompt: Sequence[int] = (1,),
    output: Sequence[int] = (),
    *,
    eos: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
    **params: Any,
) -> SequenceState:
    """A live sequence, with its sampling parameters as keywords."""
    return SequenceState(
        seq_id=seq_id,
        params=SamplingParams(**params),
        token_ids=[*prompt, *output],
        prompt_len=len(prompt),
        block_ids=[],
        eos_token_ids=list(eos),
        bad_words_token_ids=[list(word) for word in bad_words],
    )


def sampler(ops: OpTable | None = None) -> StandardSampler:
    return StandardSampler(ops or SelectedOps(TorchOps()))


def noise(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Random logits [rows, vocab], always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * scale


def token_of(logits: Tensor, state: SequenceState) -> int:
    """The one token of one row that must not fail. logits [vocab]."""
    tokens, failed = sampler().sample(logits[None].clone(), [state])
    assert not failed
    return tokens[0].token_ids[0]


def expected_adjusted(logits: Sequence[float], state: SequenceState) -> list[float]:
    """Masks, bias and penalties of vLLM's documentation, one token id at a time."""
    params, prompt = state.params, state.token_ids[: state.prompt_len]
    output = state.token_ids[state.prompt_len :]
    found = []
    for token, value in enumerate(logits):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            value = NEVER
        for word in state.bad_words_token_ids:
            before = word[:-1]
            tail = output[len(output) - len(before) :] if len(before) <= len(output) else None
            if token == word[-1] and tail == before:
                value = NEVER
        ends = {*state.eos_token_ids, *params.stop_token_ids}
        if token in ends and len(output) < params.min_tokens:
            value = NEVER
        value += (params.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in output:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty * (token in output)
        found.append(value)
    return found


def same(left: SampledTokens, right: SampledTokens) -> bool:
    """Equal to the last bit, whatever the sequences are called."""
    return (left.token_ids[0], left.logprobs) == (right.token_ids[0], right.logprobs)


def check_logprobs(found: TokenLogprobs, logits: Tensor, token: int, count: int) -> None:
    """Against log_softmax of raw logits [vocab] in double precision."""
    exact = logits.double().log_softmax(-1)
    assert found.token_ids[0] == token
    assert len(found.token_ids) == len(found.logprobs) == count + 1
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    assert found.token_ids[1:] == order[:count]
    for i, value in zip(found.token_ids, found.logprobs, strict=True):
        assert abs(value - float(exact[i])) < 1e-5
    assert found.rank == 1 + int((logits > logits[token]).sum())
