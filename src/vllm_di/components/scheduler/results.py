"""Checks a step's result against its plan. A component whose result does not fit is broken, and a
missing or extra token would be a wrong answer: the sequence ends with an error that says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vllm_di.components.messages import StepPlan, StepResult
from vllm_di.components.scheduler.sequence import Sequence
from vllm_di.errors import EngineDeadError

log = logging.getLogger(__name__)


def misfits(
    plan: StepPlan, result: StepResult, live: Mapping[int, Sequence], vocab_size: int
) -> dict[int, str]:
    """seq_id to a reason, of the plan's live sequences that cannot go on. Raises EngineDeadError
    for the result of another step: its tokens cannot be assigned to sequences."""
    if result.step != plan.step:
        raise EngineDeadError(f"step {plan.step} was answered with the result of {result.step}")
    if _is_plain(plan, result, live, vocab_size):
        return {}
    numbers: dict[int, int] = {}
    doubled: set[int] = set()
    for token in result.tokens:
        if token.seq_id in numbers:
            doubled.add(token.seq_id)
        numbers[token.seq_id] = numbers.get(token.seq_id, 0) + len(token.token_ids)
    found: dict[int, str] = {}
    for share in plan.scheduled:
        seq_id, number = share.seq_id, numbers.get(share.seq_id, 0)
        if seq_id not in live or seq_id in result.failed:
            continue
        most = 1 + len(share.draft_tokens) if share.samples else 0
        if seq_id in doubled or not share.samples <= number <= most:
            wanted = "one token" if most == 1 else f"1 to {most}"
            if not most:
                wanted = "none, its prompt goes on"
            found[seq_id] = f"the step gave {number} tokens for sequence {seq_id}, not {wanted}"
    for token in result.tokens:
        sequence = live.get(token.seq_id)
        if sequence is None:
            continue
        for token_id in token.token_ids:
            if not 0 <= token_id < vocab_size:
                found.setdefault(
                    token.seq_id,
                    f"the step gave token {token_id} for sequence {token.seq_id}, outside the "
                    f"vocabulary [0, {vocab_size})",
                )
        expected = len(token.token_ids) if sequence.request.params.logprobs is not None else 0
        if len(token.logprobs or ()) < expected:
            found.setdefault(
                token.seq_id,
                f"the step gave no log-probabilities for sequence {token.seq_id}, which asked for "
                "them",
            )
    _check_scores(plan, result, live, found)
    for seq_id, reason in found.items():
        log.error("step %d: %s; its request %r ends", plan.step, reason, _name(live[seq_id]))
    planned = {share.seq_id for share in plan.scheduled}
    scores = (scored.seq_id for scored in result.prompt_logprobs)
    for seq_id in sorted({*numbers, *result.failed, *scores} - planned):
        log.error(
            "step %d: the result names sequence %d, which had no part in it; that entry is dropped",
            plan.step,
            seq_id,
        )
    return found


def vector_misfits(
    plan: StepPlan, result: StepResult, live: Mapping[int, Sequence], size: int
) -> dict[int, str]:
    """As ``misfits``, of a model that pools: a prompt whose end ran gives a vector of ``size``
    numbers, and nothing else does."""
    if result.step != plan.step:
        raise EngineDeadError(f"step {plan.step} was answered with the result of {result.step}")
    lengths: dict[int, list[int]] = {}
    for vector in result.vectors:
        lengths.setdefault(vector.seq_id, []).append(len(vector.data) // 4)
    found: dict[int, str] = {}
    for share in plan.scheduled:
        if share.seq_id not in live or share.seq_id in result.failed:
            continue
        wanted = [size] if share.samples else []
        if (got := lengths.get(share.seq_id, [])) != wanted:
            found[share.seq_id] = (
                f"the step gave vectors of {got} numbers for sequence {share.seq_id}, not {wanted}"
            )
            name = _name(live[share.seq_id])
            log.error("step %d: %s; its request %r ends", plan.step, found[share.seq_id], name)
    planned = {share.seq_id for share in plan.scheduled}
    extra = {token.seq_id for token in result.tokens} | (lengths.keys() - planned)
    for seq_id in sorted(extra):
        log.error(
            "step %d: the result has a token, or a vector that no prompt waits for, of sequence %d",
            plan.step,
            seq_id,
        )
    return found


def _is_plain(
    plan: StepPlan, result: StepResult, live: Mapping[int, Sequence], vocab_size: int
) -> bool:
    """Whether the result is one token for each sequence of the plan, in its order, and nothing
    else was asked for: most steps, which need no closer look."""
    if len(result.tokens) != len(plan.scheduled) or result.failed or result.prompt_logprobs:
        return False
    for share, token in zip(plan.scheduled, result.tokens, strict=True):
        sequence, ids = live.get(share.seq_id), token.token_ids
        if token.seq_id != share.seq_id or not share.samples or sequence is None or len(ids) != 1:
            return False
        params = sequence.request.params
        if params.logprobs is not None or params.prompt_logprobs is not None:
            return False
        if not 0 <= ids[0] < vocab_size:
            return False
    return True


def _check_scores(
    plan: StepPlan, result: StepResult, live: Mapping[int, Sequence], found: dict[int, str]
) -> None:
    """The prompt's log-probabilities come piece after piece, and are complete with the first
    token."""
    known = {
        share.seq_id: len(live[share.seq_id].prompt_logprobs)
        for share in plan.scheduled
        if share.seq_id in live and wants_scores(live[share.seq_id])
    }
    for scored in result.prompt_logprobs:
        if scored.seq_id in known:
            if scored.start != known[scored.seq_id] + 1:
                found.setdefault(
                    scored.seq_id,
                    f"the prompt log-probabilities of sequence {scored.seq_id} go on at position "
                    f"{scored.start}, not {known[scored.seq_id] + 1}",
                )
            known[scored.seq_id] += len(scored.positions)
    for share in plan.scheduled:
        if share.samples and share.seq_id in known and share.seq_id not in result.failed:
            expected = live[share.seq_id].prompt_len - 1
            if known[share.seq_id] != expected:
                found.setdefault(
                    share.seq_id,
                    f"sequence {share.seq_id} has {known[share.seq_id]} prompt log-probabilities "
                    f"of {expected}",
                )


def wants_scores(sequence: Sequence) -> bool:
    """Whether its prompt's log-probabilities are still to be told."""
    return sequence.request.params.prompt_logprobs is not None and not sequence.reported


def _name(sequence: Sequence) -> str:
    return sequence.request.request_id
