"""No drafts: one token of a sequence a step."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_di.components.interfaces import Drafter


class NoDrafter(Drafter):
    """Guesses nothing."""

    def __init__(self) -> None: ...

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        return []
