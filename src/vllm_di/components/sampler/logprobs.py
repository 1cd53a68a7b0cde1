"""Log-probabilities as clients want them: the token that stands there, then the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.messages import MAX_LOGPROBS, TokenLogprobs


def report(
    logprobs: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """logprobs [rows, vocab], one token and one number of alternatives a row.

    The same number of candidates is taken for any ``counts``, so that a row's answer does not
    depend on what its neighbours asked for.
    """
    ids = torch.tensor(token_ids, device=logprobs.device)[:, None]
    chosen = logprobs.gather(-1, ids)  # [rows, 1]
    values = chosen[:, 0].tolist()
    if not any(counts):
        ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
        rows = zip(token_ids, values, ranks, strict=True)
        return [TokenLogprobs([token], [value], rank) for token, value, rank in rows]
    top = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[-1]))  # [rows, 20]
    found = []
    for i, (best, best_ids) in enumerate(
        zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ):
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
