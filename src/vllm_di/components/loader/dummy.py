"""Random weights, for tests, benchmarks and models whose weights are not at hand."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_di.components.interfaces import Loader, Model


class DummyLoader(Loader):
    """The same weights for the same seed, on any number of ranks."""

    def __init__(self, *, seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]) -> None:
        self._seed = seed

    def load(self, model: Model) -> None:
        model.load_random(self._seed)
