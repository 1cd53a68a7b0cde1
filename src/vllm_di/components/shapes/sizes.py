"""What policies with static shapes share: their lists of sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated

import msgspec

from vllm_di.components.interfaces import SchedulerLimits
from vllm_di.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]


_COUNTED = {
    "sizes": "tokens",
    "decode_seqs": "sequences",
    "prefill_seqs": "prompts",
    "prefill_queries": "tokens of a prompt",
    "columns": "blocks of a sequence",
}
"""Key to what its sizes count."""


class Sizes:
    """The sizes that one dimension may have. Raises ConfigError where ``needed``, the most that a
    step can have of it, is beyond the largest; ``remedy`` says what else could be changed."""

    def __init__(self, key: str, sizes: Sequence[int], needed: int, remedy: str) -> None:
        self.sizes = sorted(set(sizes))
        self._key = key
        counted = _COUNTED.get(key.rpartition(".")[2], "of them")
        if not self.sizes or self.sizes[-1] < needed:
            raise ConfigError(
                f"{key}: a step may have {needed} {counted}, but "
                f"{f'this list ends at {self.sizes[-1]}' if self.sizes else 'this list is empty'}; "
                f"add {needed} to it, or {remedy}"
            )
        # nothing is compiled for what no step can have
        del self.sizes[bisect_left(self.sizes, needed) + 1 :]

    def over(self, count: int) -> int:
        """The smallest size that holds ``count``. Raises ValueError where there is none."""
        place = bisect_left(self.sizes, count)
        if place == len(self.sizes):
            raise ValueError(f"{self._key}: {count} is beyond the largest size {self.sizes[-1]}")
        return self.sizes[place]

    def below(self, size: int) -> int:
        """The size before ``size``; 0 for the smallest."""
        place = self.sizes.index(size)
        return self.sizes[place - 1] if place else 0


def refuse_mixed(limits: SchedulerLimits, what: str) -> None:
    """Raise ConfigError unless the scheduler keeps prefills and decodes apart."""
    report = limits.report()
    if report.mixed_steps or report.drafts:
        if report.mixed_steps:
            why, key = "a step of {what} is a prefill or a decode, not both", "mixed_steps"
        else:
            why, key = "a decode of {what} is one token of each sequence, no drafts", "drafts"
        raise ConfigError(f"{why.format(what=what)}; set limits.{key}=false")


def padding_slot(limits: SchedulerLimits) -> int:
    """The slot of padding tokens: in block 0 where that is kept free for them."""
    return 0 if limits.report().null_block else -1
