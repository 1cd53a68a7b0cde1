"""What the one scheduler must respect, as plain data from YAML."""

from __future__ import annotations

from vllm_di.components.interfaces import SchedulerLimits
from vllm_di.components.messages import LimitsReport


class StandardLimits(SchedulerLimits):
    """Each key is a field of LimitsReport."""

    def __init__(self, *, config: LimitsReport) -> None:
        self._report = config

    def report(self) -> LimitsReport:
        return self._report
