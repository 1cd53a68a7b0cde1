"""What the time of a step depends on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_di.components.messages import KvGroup, StepPlan


class StepShape(msgspec.Struct, frozen=True, array_like=True):
    """A step as numbers."""

    decodes: int
    """Sequences that run their last token."""
    context: float
    """Keys that these see, summed over the sequences."""
    prompts: int
    """Sequences that run a prompt, or a chunk of one."""
    prompt_tokens: int
    """Of all of them."""
    pairs: float
    """A prompt token and a key that it sees, summed over the tokens."""

    @property
    def rows(self) -> int:
        """Tokens of the step."""
        return self.decodes + self.prompt_tokens


class Shaper:
    """Counts a plan. Under a sliding window a layer sees the window's keys alone: keys are the mean
    over the layers."""

    def __init__(self, groups: Sequence[KvGroup]) -> None:
        layers = sum(len(group.layers) for group in groups)
        self._windows = [(group.window, len(group.layers) / layers) for group in groups]
        self._is_plain = all(window is None for window, _ in self._windows)

    def shape(self, plan: StepPlan) -> StepShape:
        """Of a plan without drafts."""
        decodes = prompts = prompt_tokens = 0
        context, pairs = 0.0, 0.0
        for share in plan.scheduled:
            end = share.num_computed + share.num_tokens
            if share.is_prefill:
                prompts += 1
                prompt_tokens += share.num_tokens
                pairs += self._pairs(end) - self._pairs(share.num_computed)
            else:
                decodes += 1
                context += end if self._is_plain else self._keys(end)
        return StepShape(decodes, context, prompts, prompt_tokens, pairs)

    def _keys(self, end: int) -> float:
        """That the last of ``end`` tokens sees."""
        return sum(part * (end if w is None else min(end, w)) for w, part in self._windows)

    def _pairs(self, end: int) -> float:
        """That the first ``end`` tokens see together."""
        if self._is_plain:
            return end * (end + 1) / 2
        total = 0.0
        for window, part in self._windows:
            near = end if window is None else min(end, window)
            total += part * (near * (near + 1) / 2 + (end - near) * (window or 0))
        return total
