"""Log-probabilities as clients want them: the token that stands there, then the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.messages import MAX_LOGPROBS, TokenLogprobs

STRETCH = 128
"""Neighbours of which only the best is looked at first; 64 to 256 are alike on a host."""

PIECE = 8
"""Rows whose log-probabilities are computed at once: they stay in a core's cache, and long prompts
take no more memory than short ones."""


def report(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """logits [rows, vocab], one token and one number of alternatives a row."""
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), PIECE):
        some = slice(start, start + PIECE)
        found += _report(logits[some].log_softmax(-1), token_ids[some], counts[some])
    return found


def _report(
    logprobs: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """The same number of candidates is taken for any ``counts``, so that a row's answer does not
    depend on what its neighbours asked for."""
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logprobs.device)[:, None]
    chosen = logprobs.gather(-1, ids)  # [rows, 1]
    values = chosen[:, 0].tolist()
    if not any(counts):
        ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
        rows = zip(token_ids, values, ranks, strict=True)
        return [TokenLogprobs([token], [value], rank) for token, value, rank in rows]
    top_values, top_ids = top(logprobs, min(MAX_LOGPROBS, logprobs.shape[-1]))  # [rows, 20]
    found = []
    for i, (best, best_ids) in enumerate(zip(top_values.tolist(), top_ids.tolist(), strict=True)):
        token, value = token_ids[i], values[i]
        ranked = sorted(zip(best, best_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        ranked = ranked[: counts[i]]
        above = sum(other > value for other in best)
        if above == len(best):  # less likely than all candidates: count in the whole row
            above = int((logprobs[i] > value).sum())
        found.append(
            TokenLogprobs(
                [token, *(other for _, other in ranked)],
                [value, *(other for other, _ in ranked)],
                above + 1,
            )
        )
    return found


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row, and where they are. values [rows, vocab].

    They lie within the ``count`` stretches of neighbours whose maxima are largest, and to look for
    the maxima is many times faster than to look for the largest of all.
    """
    vocab = values.shape[-1]
    stretches = vocab // STRETCH
    if stretches <= count:
        best = values.topk(count)
        return best.values, best.indices
    whole = stretches * STRETCH
    within = torch.arange(STRETCH, dtype=torch.int64, device=values.device)
    rest = torch.arange(whole, vocab, dtype=torch.int64, device=values.device)
    peaks = values[:, :whole].unflatten(-1, (stretches, STRETCH)).amax(-1)  # [rows, stretches]
    starts = peaks.topk(count).indices[..., None] * STRETCH
    ids = torch.cat(
        ((starts + within).flatten(1), rest.expand(len(values), -1)), -1
    )  # [rows, candidates]
    best = values.gather(-1, ids).topk(count)
    return best.values, ids.gather(-1, best.indices)
