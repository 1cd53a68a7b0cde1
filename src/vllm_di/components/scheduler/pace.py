"""How many prompt tokens fit a step, from what recent steps took."""

from __future__ import annotations

from collections import deque
from statistics import median

from vllm_di.components.messages import StepPlan

RECENT = 8
"""Steps of a kind that are remembered: few, so that the estimate follows the load and the contexts;
enough for a median, which one disturbed step does not move."""
FIRST_CHUNK = 64
"""Prompt tokens of a step before anything was measured."""
LEAST_CHUNK = 16
"""Prompt tokens that a step always has room for, however slow the machine is."""
LEAST_SHARE = 1.0
"""Time for prompts in a step, at least, in what its decodes take alone: a step of slow decodes may
take twice their time, and prompts have half of the machine."""


class StepPace:
    """Keeps steps that carry decodes within ``bound`` seconds, by the prompt tokens they may take.

    Two times are kept: that of a step of decodes alone, by their number (to a power of two), and
    that which a prompt token adds. The second counts whatever is not in the first, so that a wrong
    first one cannot lead past the bound for longer than a few steps.
    """

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._alone: dict[int, deque[float]] = {}
        """Seconds of steps without prompts, by the bit length of the number of their decodes."""
        self._mixed: deque[tuple[int, int, float]] = deque(maxlen=RECENT)
        """(prompt tokens, decodes, seconds) of steps with prompts."""

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Take in what a step took."""
        prompts = [share.num_tokens for share in plan.scheduled if share.is_prefill]
        decodes = len(plan.scheduled) - len(prompts)
        if prompts:
            self._mixed.append((sum(prompts), decodes, seconds))
        else:
            times = self._alone.setdefault(decodes.bit_length(), deque(maxlen=RECENT))
            times.append(seconds)

    def prompt_tokens(self, decodes: int) -> int:
        """Prompt tokens for a step beside ``decodes``: what the bound leaves room for. Prompts
        never wait for ever: at least LEAST_CHUNK, and at least LEAST_SHARE of the decodes' time."""
        cost = self._token_seconds()
        if cost is None:
            return FIRST_CHUNK
        alone = self._decode_seconds(decodes)
        spare = max(self._bound - alone, LEAST_SHARE * alone)
        return max(LEAST_CHUNK, int(spare / max(cost, 1e-9)))

    def _decode_seconds(self, decodes: int) -> float:
        """Of a step of so many decodes alone, by the nearest number that was measured; 0 before."""
        if not self._alone:
            return 0.0
        size = decodes.bit_length()
        return median(self._alone[min(self._alone, key=lambda known: abs(known - size))])

    def _token_seconds(self) -> float | None:
        """What a prompt token adds to a step: the upper quartile of recent steps. Contexts grow, so
        the latest tend to be the slowest; two disturbed steps in eight do not count. None before
        the first."""
        costs = []
        for tokens, decodes, seconds in self._mixed:
            # never below a tenth of the step: the time of the decodes is an estimate, too
            added = max(seconds - self._decode_seconds(decodes), 0.1 * seconds)
            costs.append(added / tokens)
        return sorted(costs, reverse=True)[len(costs) // 4] if costs else None
