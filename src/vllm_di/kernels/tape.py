"""Tapes: the kernels of a step recorded, and replayed in one call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_di.kernels.bindings import CpuKernels

FREE = ("empty", "detach", "alias")
"""Ops of torch besides views that compute nothing."""


def record(
    kernels: CpuKernels, step: Callable[[], Tensor], threads: int
) -> tuple[Tensor, Callable[[], None] | None, str]:
    """Run ``step`` -> (its result, the replay, why there is none).

    There is none when torch computed something on the way, which a replay would leave out. The
    recording is freed with the replay.
    """
    handle = kernels.tape_start()
    try:
        with Watch() as watch:
            result = step()
    finally:
        kernels.tape_stop()
    replay = functools.partial(kernels.tape_replay, handle, threads)
    weakref.finalize(replay, kernels.tape_free, handle)
    if watch.seen:
        return result, None, f"torch computes {', '.join(sorted(watch.seen))}"
    return result, replay, ""


class Watch(TorchDispatchMode):
    """Notes the ops of torch that compute something."""

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
