"""Tapes: the kernels of a step recorded, and replayed in one call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_di.kernels.bindings import CpuKernels
from vllm_di.kernels.memory import Pool

FREE = ("empty", "detach", "alias")
"""Ops of torch besides views that compute nothing."""


class Tape:
    """A recorded step. A call runs every kernel again, in order, on the current contents of its
    buffers; ``kept`` holds the owners of that memory."""

    def __init__(self, kernels: CpuKernels, handle: int, threads: int, kept: object) -> None:
        self._run, self._handle, self._threads, self._kept = (
            kernels.tape_replay,
            handle,
            threads,
            kept,
        )
        weakref.finalize(self, kernels.tape_free, handle)

    def __call__(self) -> None:
        self._run(self._handle, self._threads)


def record(
    kernels: CpuKernels, step: Callable[[], Tensor], threads: int, pool: Pool
) -> tuple[Tensor, Tape | None, str]:
    """Run ``step``, whose outputs come from ``pool`` -> (its result, the tape or None, why None).

    There is no tape when torch computed something in between, which a replay would leave out.
    """
    handle = kernels.tape_start()
    try:
        with Watch() as watch:
            result = step()
    finally:
        kernels.tape_stop()
    tape = Tape(kernels, handle, threads, (pool, result))
    if watch.seen:
        return result, None, f"torch computes {', '.join(sorted(watch.seen))}"
    return result, tape, ""


class Watch(TorchDispatchMode):
    """Notes the ops of torch that compute something."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled meanwhile: True would import all of torch.compile, half a second."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in FREE):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))
