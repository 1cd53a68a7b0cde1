"""``kv_layout.block_size=auto``: the block size that suits the attention, before both are built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_di.components.interfaces import AttentionBackend
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.schema import Part, Plan, part_of
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError


def settle_block_size(
    plan: Plan, assembly: Assembly, stage: int, objects: Mapping[str, Any]
) -> None:
    """Put the attention's first choice in place of ``auto``; where it reads blocks of any size, the
    layout decides. Raises ConfigError for parts of it that share no size."""
    layout = plan.parts.get("kv_layout")
    if layout is None or layout.values.get("block_size") != "auto":
        return
    if (given := objects.get("attention")) is not None:
        wanted = [given.block_sizes]
    else:
        attention = plan.parts.get("attention")
        attention = attention or part_of(WorkerContainer, assembly, "attention", stage)
        wanted = list(_block_sizes(attention))
    if not any(wanted):
        return
    first, *others = filter(None, wanted)
    common = [size for size in first if all(size in other for other in others)]
    if not common:
        path = assembly.path(WorkerContainer, "attention", stage)
        sizes = " and ".join(", ".join(map(str, one)) for one in (first, *others))
        raise ConfigError(
            f"{assembly.place(f'{path}._target_')}: {path}: its parts read blocks of {sizes} "
            "tokens, and share one cache"
        )
    layout.values["block_size"] = common[0]


def _block_sizes(part: Part) -> Iterator[Any]:
    """Of an attention backend and of those within it."""
    if issubclass(part.cls, AttentionBackend):
        yield part.cls.block_sizes
    for inner in part.parts.values():
        yield from _block_sizes(inner)
