"""Whether two answers are the same."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_di.components.messages import TokenLogprobs
from vllm_di.conformance.driving import Answer


def assert_same(found: Sequence[Answer], wanted: Sequence[Answer], slack: float, what: str) -> None:
    """Equal tokens and nearly equal log-probs. Where two tokens are within ``slack`` of each other
    either may be chosen, and the rest of the answer is not compared. Raises AssertionError that
    says ``what`` differs."""
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        where = f"{what}, request {i}"
        assert ours.error is None, f"{where}: {ours.error}"
        _near(ours.prompt_logprobs, theirs.prompt_logprobs, slack, f"{where}, prompt")
        same = len(ours.token_ids)
        if ours.token_ids != theirs.token_ids:
            pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), -1)
            assert same >= 0, f"{where}: {len(ours.token_ids)} tokens, not {len(theirs.token_ids)}"
            gap = _gap(theirs.logprobs[same : same + 1], ours.token_ids[same])
            assert gap <= 2 * slack, (
                f"{where}: token {same} is {ours.token_ids[same]}, not {theirs.token_ids[same]}, "
                f"{gap:.3g} nat less likely"
            )
        _near(ours.logprobs[:same], theirs.logprobs[:same], slack, where)


def _near(
    found: Sequence[TokenLogprobs], wanted: Sequence[TokenLogprobs], slack: float, where: str
) -> None:
    assert len(found) == len(wanted), f"{where}: {len(found)} log-probs, not {len(wanted)}"
    for at, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours.token_ids[0] == theirs.token_ids[0], f"{where}, position {at}: another token"
        off = abs(ours.logprobs[0] - theirs.logprobs[0])
        assert off <= slack, f"{where}, position {at}: off by {off:.3g} nat, {slack:.3g} may be"


def _gap(told: Sequence[TokenLogprobs], token: int) -> float:
    """Nats between the chosen token and another."""
    if not told or token not in told[0].token_ids:
        return float("inf")
    return told[0].logprobs[0] - told[0].logprobs[told[0].token_ids.index(token)]
