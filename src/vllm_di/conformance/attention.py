"""One attention check: place a batch, run the backend, compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    Device,
    KvLayout,
    LayerCache,
)
from vllm_di.conformance.numbers import assert_close
from vllm_di.conformance.paged import Load, attend_through, kv_spec, num_blocks, place
from vllm_di.conformance.subject import Subject


@dataclass
class Judge:
    """The opened parts, and a comparison on them."""

    backend: AttentionBackend
    layout: KvLayout
    device: Device
    dtype: torch.dtype
    seed: int

    def compare(self, spec: AttentionSpec, loads: Sequence[Load]) -> None:
        """Raises AssertionError that names the batch."""
        cache, total = self.cache(spec, loads)
        batch = place(
            loads,
            spec,
            self.layout,
            cache,
            total_blocks=total,
            dtype=self.dtype,
            device=self.device.torch_device,
            seed=self.seed,
        )
        found = attend_through(self.backend, batch, cache, spec)
        assert found.dtype == self.dtype, f"dtype {found.dtype}, not {self.dtype}"
        try:
            assert_close(found, batch.expected(spec), long=True)
        except AssertionError as error:
            runs = ", ".join(f"{a.before}+{a.queries}" for a in loads)
            raise AssertionError(f"{spec}, sequences {runs}: {error}") from error

    def cache(self, spec: AttentionSpec, loads: Sequence[Load]) -> tuple[LayerCache, int]:
        total = num_blocks(loads, self.layout.block_size)
        return self.layout.allocate([kv_spec(spec)], total, self.dtype)[0], total


@contextmanager
def judge(subject: Subject, dtype: str) -> Iterator[Judge]:
    """Raises NotDeclared for a dtype that is not named."""
    kind = subject.dtype(dtype)
    with (
        subject.parts("attention", "kv_layout", "device") as container,
        torch.inference_mode(),
    ):
        backend = container.attention()
        yield Judge(backend, container.kv_layout(), container.device(), kind, subject.seed)


def shapes(subject: Subject) -> list[tuple[int, int, int]]:
    """(heads, kv heads, head size): groups of 1, 4 and 8 query heads for each kv head, at the
    declared sizes among 64, 80 and 128."""
    declared = subject.declared.head_sizes
    sizes = [s for s in (64, 80, 128) if declared is None or s in declared] or [declared[0]]  # type: ignore[index]
    found = [(8, 2, size) for size in sizes]
    return [*found, (4, 4, sizes[0]), (8, 1, sizes[0])]
