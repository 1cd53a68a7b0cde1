"""What the one scheduler must respect, as plain data from YAML."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_di.components.interfaces import SchedulerLimits
from vllm_di.components.messages import LimitsReport

AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class StandardLimits(SchedulerLimits):
    """Each key is a field of LimitsReport."""

    def __init__(
        self,
        *,
        mixed_steps: bool,
        chunked_prefill: bool,
        max_prefill_rows: AtLeastOne | None,
        max_batch_context: AtLeastOne | None,
        null_block: bool,
        drafts: bool,
    ) -> None:
        self._report = LimitsReport(
            mixed_steps=mixed_steps,
            chunked_prefill=chunked_prefill,
            max_prefill_rows=max_prefill_rows,
            max_batch_context=max_batch_context,
            null_block=null_block,
            drafts=drafts,
        )

    def report(self) -> LimitsReport:
        return self._report
