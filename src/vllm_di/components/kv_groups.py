"""Layers of one kind share a block table; all groups of them draw from one pool of blocks.

A block costs as much in every group: on each rank the groups have about equally many layers, and
the layer at place i of each uses the tensors at place i of the pool. Where the kinds do not divide
evenly some places stay unused: as few groups are made as keep that below ``MOST_UNUSED``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from vllm_di.components.messages import CacheSize, KvGroup, KvSpec, WorkerReport

MOST_UNUSED = 0.05
"""Share of its places that a kind of layers may leave unused, for fewer groups: each costs tables
in every step."""

log = logging.getLogger(__name__)


def group_layers(stages: Sequence[Sequence[KvSpec]]) -> list[KvGroup]:
    """The groups of a model whose stages have these layers: the same number for every stage, since
    a block id means one block on all of them. Groups without a window come first."""
    specs = [spec for stage in stages for spec in stage]
    windows = sorted({spec.window for spec in specs}, key=lambda w: (w is not None, w))
    if len(windows) < 2:
        return [KvGroup([spec.layer for spec in specs], windows[0] if windows else None)]
    if len({(spec.num_kv_heads, spec.head_size) for spec in specs}) > 1:
        log.warning(
            "layers with unlike KV heads cannot share blocks: those with a sliding window keep the "
            "blocks their window has passed"
        )
        return [KvGroup([spec.layer for spec in specs])]
    kinds = [[[s.layer for s in stage if s.window == w] for stage in stages] for w in windows]
    counts = _counts([[len(layers) for layers in kind] for kind in kinds])
    return [
        KvGroup([layer for layers in kind for layer in layers[place::count]], window)
        for window, kind, count in zip(windows, kinds, counts, strict=True)
        for place in range(count)
    ]


def _counts(layers: list[list[int]]) -> list[int]:
    """layers[kind][stage] -> into how many groups each kind is cut."""

    def unused(counts: Sequence[int]) -> float:
        """Share of the places that stay unused, of the kind where it is largest."""
        places = sum(
            max(-(-kind[stage] // count) for kind, count in zip(layers, counts, strict=True))
            for stage in range(len(layers[0]))
        )
        return max(
            places * count / sum(kind) - 1 for kind, count in zip(layers, counts, strict=True)
        )

    # groups of up to ``size`` layers a stage
    choices = [
        [max(-(-n // size) for n in kind) for kind in layers]
        for size in range(1, max(map(max, layers)) + 1)
    ]
    good = [c for c in choices if unused(c) <= MOST_UNUSED] or [min(choices, key=unused)]
    return min(good, key=lambda c: (sum(c), unused(c)))


class Groups:
    """The groups as a rank with some of the layers sees them."""

    def __init__(self, specs: Sequence[KvSpec], groups: Sequence[KvGroup]) -> None:
        group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
        self.of_layer = [group_of[spec.layer] for spec in specs]
        """The group of each layer."""
        members: list[list[int]] = [[] for _ in groups]
        self.places = [0] * len(specs)
        """For each layer, its index in ``pool``: the tensors that it uses."""
        for index, group in enumerate(self.of_layer):
            self.places[index] = len(members[group])
            members[group].append(index)
        self.pool = [specs[index] for index in max(members, key=len, default=[])]
        """A layer for each place of the pool."""
        self.count = len(groups)


def sized(report: WorkerReport, groups: list[KvGroup], stages: Sequence[CacheSize]) -> WorkerReport:
    """The report of all stages, now that each has said how much fits."""
    num_blocks = min(size.num_blocks for size in stages)
    bytes_per_block = sum(size.bytes_per_block for size in stages)
    return msgspec.structs.replace(
        report,
        num_blocks=num_blocks,
        bytes_per_block=bytes_per_block,
        kv_groups=groups,
        details=report.details | {"kv_cache_bytes": num_blocks * bytes_per_block},
    )
