"""Steps called one by one, warmed up on a small cache before the real one is sized."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_di.components.interfaces import BatchPlan
from vllm_di.components.messages import KvGroup
from vllm_di.components.program.eager import EagerProgram

TRIAL_BLOCKS = 2
"""Of the small cache: the null block, and one."""


class HpuProgram(EagerProgram):
    """Compiled graphs take memory that nobody can tell beforehand. Each shape is therefore run on a
    cache of two blocks first, and the real cache gets what is left. The graphs of the real cache
    are compiled anew, as its shape differs, and take the same."""

    def prepare(self, groups: Sequence[KvGroup]) -> None:
        self._trial_groups = groups

    def compile(self, plan: BatchPlan) -> None:
        if not self._caches:
            super().allocate(self._trial_groups, TRIAL_BLOCKS)
        self.run(plan)

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        self._caches = []
        super().allocate(groups, num_blocks)
