"""Any shape: nothing is padded."""

from __future__ import annotations

from vllm_di.components.interfaces import ShapePolicy


class DynamicShapes(ShapePolicy):
    """For devices that take batches as they come."""

    def __init__(self) -> None: ...

    def padded_tokens(self, num_tokens: int) -> int:
        return num_tokens

    def warm_up_sizes(self, max_num_tokens: int) -> list[int]:
        """One decode row and a small prefill: enough to have every kernel loaded."""
        return sorted({1, min(16, max_num_tokens)})
