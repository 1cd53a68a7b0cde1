"""Whether the workers of two roles fit together, and what both are for the scheduler."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_di.components.device.sizes import show_size
from vllm_di.components.executor.lanes import Lane
from vllm_di.components.executor.pipeline import strictest
from vllm_di.components.executor.side_blocks import SideBlocks
from vllm_di.components.interfaces import WorkerLauncher
from vllm_di.components.messages import KvPart, WarmUp, WorkerReport
from vllm_di.components.remote import RemoteMethods
from vllm_di.errors import ConfigError

BITS = {"float16": 11, "bfloat16": 8, "float32": 24}
"""Of the significand."""
RANGES = {"float16": 5, "bfloat16": 8, "float32": 8}
"""Bits of the exponent."""
HOST = "cpu"
"""``WorkerReport.device`` of a worker whose cache is in the host's memory."""

log = logging.getLogger(__name__)


class Sides:
    """The reports of the decode side and of one replica of the other."""

    def __init__(
        self,
        launcher: WorkerLauncher,
        worlds: Mapping[str, int],
        decode: WorkerReport,
        prefill: WorkerReport,
    ) -> None:
        self._launchers = {role: launcher.for_role(role) for role in ("prefill", "decode")}
        self._worlds = worlds
        self.reports = {"prefill": prefill, "decode": decode}
        self.block_size = math.lcm(prefill.block_size, decode.block_size)
        """The scheduler's: whole blocks of either side."""

    def check(self) -> None:
        """Raises ConfigError where the roles are not one model, or it pools."""
        prefill, decode = self.reports["prefill"], self.reports["decode"]
        for role, report in self.reports.items():
            if report.pooling is not None:
                raise ConfigError(
                    f"{self._launchers[role].place(0, 'pooler')}: a model that pools has no tokens "
                    "for another role to run; take pooler=none, or a platform without roles"
                )
        self._same("model.vocab_size", prefill.vocab_size, decode.vocab_size)
        self._same("model.max_model_len", prefill.max_model_len, decode.max_model_len)
        self._same("model", _shapes(prefill), _shapes(decode))
        self._same("model", prefill.kv_groups, decode.kv_groups)
        if prefill.dtype != decode.dtype:
            log.warning(
                "prompts run in %s and decodes in %s: tokens may differ from those of either",
                prefill.dtype,
                decode.dtype,
            )

    def check_room(self, reports: Sequence[WorkerReport]) -> None:
        """Raise ConfigError where the caches of all lanes want more of the host's memory than is
        free: it is taken when it is used, so each lane found all of it. ``reports``: the decode
        side's first."""
        wanted, free = 0, None
        for index, report in enumerate(reports):
            ranks = self._worlds["prefill" if index else "decode"]
            found = report.details.get("memory_free")  # of one rank
            if report.device == HOST and found is not None:
                free = ranks * found if free is None else free
                wanted += ranks * report.num_blocks * report.bytes_per_block
        if free is not None and wanted > free:
            raise ConfigError(
                f"{self._launchers['prefill'].place(0, 'worker')}: the workers of both roles want "
                f"{show_size(wanted)} of this host for their KV caches, but {show_size(free)} are "
                "free; lower what sizes them (worker.memory_fraction, unless kv_cache_memory or "
                "num_blocks is set), or executor.prefill_replicas"
            )

    def _same(self, key: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            places = [self._launchers[role].place(0, key) for role in ("decode", "prefill")]
            raise ConfigError(
                f"{places[0]} comes out as {theirs}, but {places[1]} as {ours}: both roles run one "
                "model and share its cache"
            )

    def open(self, lanes: Sequence[Lane], session: bytes) -> None:
        """Tell every worker how heads lie on all ranks, and which session this is. Raises
        ConfigError for a worker that hands nothing over."""
        heads = {
            layer: min(count, other)
            for (layer, count), (_, other) in zip(
                self._heads("prefill"), self._heads("decode"), strict=True
            )
        }
        dtypes: dict[str, set[str]] = {}
        for lane in lanes:
            role = "decode" if lane.index == 0 else "prefill"
            report, launcher = self.reports[role], self._launchers[role]
            for stage in range(launcher.num_stages):
                if "kv_open" not in RemoteMethods(launcher.worker_class(stage)):
                    raise ConfigError(
                        f"{launcher.place(stage, 'worker')}: this worker does not hand its cache "
                        f"over; take {role}.worker=handover"
                    )
            lane.blocks = SideBlocks(self.block_size, report.block_size, report.max_model_len)
            found: list[list[KvPart]] = lane.executor.collective("kv_open", session, heads)
            dtypes[role] = {part.dtype for parts in found for part in parts}
        for one, other in (("prefill", "decode"), ("decode", "prefill")):
            for sent in dtypes[one]:
                for kept in dtypes[other]:
                    if BITS[kept] < BITS[sent] or RANGES[kept] < RANGES[sent]:
                        log.warning(
                            "the cache loses bits where it crosses from %s (%s) to %s (%s)",
                            one,
                            sent,
                            other,
                            kept,
                        )

    def _heads(self, role: str) -> list[tuple[int, int]]:
        """Of each layer its number and the KV heads that its ranks hold together; where that is
        more than the model has, the other role says how many there are."""
        specs, world = self.reports[role].kv_specs, self._worlds[role]
        return [(spec.layer, spec.num_kv_heads * world) for spec in specs]


def _shapes(report: WorkerReport) -> list[tuple[int, int, int | None]]:
    return [(spec.layer, spec.head_size, spec.window) for spec in report.kv_specs]


def joined_report(sides: Sides, reports: Sequence[WorkerReport]) -> WorkerReport:
    """What the scheduler and people are told of all lanes, the decode side first. As many blocks as
    every lane has room for."""
    prefill, decode = sides.reports["prefill"], sides.reports["decode"]
    ratios = [sides.block_size // report.block_size for report in reports]
    num_blocks = min(r.num_blocks // ratio for r, ratio in zip(reports, ratios, strict=True))
    bytes_per_block = sum(r.bytes_per_block * k for r, k in zip(reports, ratios, strict=True))
    limits = strictest([report.limits for report in reports])
    return msgspec.structs.replace(
        decode,
        block_size=sides.block_size,
        limits=msgspec.structs.replace(limits, mixed_steps=False),
        device=f"prefill: {prefill.device}; decode: {decode.device}",
        weight_bytes=sum(report.weight_bytes for report in reports),
        num_blocks=num_blocks,
        bytes_per_block=bytes_per_block,
        warm_up=_in_turn([report.warm_up for report in reports]),
        details=decode.details
        | {
            "kv_cache_bytes": num_blocks * bytes_per_block,
            "roles": {"prefill": prefill.details, "decode": decode.details},
        },
    )


def _in_turn(warm_ups: Sequence[WarmUp | None]) -> WarmUp | None:
    """Of lanes that start one after the other."""
    known = [one for one in warm_ups if one is not None]
    if not known:
        return None
    sizes = [one.program_bytes for one in known if one.program_bytes is not None]
    return WarmUp(
        seconds=sum(one.seconds for one in known),
        num_programs=sum(one.num_programs for one in known),
        program_bytes=sum(sizes) if len(sizes) == len(known) else None,
    )
