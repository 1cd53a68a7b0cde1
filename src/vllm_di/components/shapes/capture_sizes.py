"""The sizes that graphs are captured for: small steps are padded to the next of them."""

from __future__ import annotations

from bisect import bisect_left
from typing import Annotated

import msgspec

from vllm_di.components.interfaces import ShapePolicy
from vllm_di.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]


class CaptureSizes(ShapePolicy):
    """Pads a step of up to ``max_num_seqs`` tokens to the next of ``sizes``; that number itself is
    one of them. Longer steps are taken as they come."""

    def __init__(self, *, sizes: list[Count], max_num_seqs: Count) -> None:
        if not sizes:
            raise ConfigError("sizes: none given; shapes=dynamic pads nothing")
        self._sizes = sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})

    def padded_tokens(self, num_tokens: int) -> int:
        place = bisect_left(self._sizes, num_tokens)
        return self._sizes[place] if place < len(self._sizes) else num_tokens

    def warm_up_sizes(self, max_num_tokens: int) -> list[int]:
        """All sizes, and the longest step: it needs the most memory."""
        return sorted({*(s for s in self._sizes if s <= max_num_tokens), max_num_tokens})
