"""One rank, from loading weights to executing steps."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any, NamedTuple

import msgspec

from vllm_di.components.attention.spec import check_block_size
from vllm_di.components.device import system
from vllm_di.components.device.sizes import parse_size, show_size
from vllm_di.components.interfaces import (
    AttentionBackend,
    Device,
    DeviceMemory,
    KvLayout,
    Loader,
    Model,
    ModelProgram,
    ModelRunner,
    OpTable,
    Placement,
    SchedulerLimits,
    Worker,
)
from vllm_di.components.kv_groups import Groups
from vllm_di.components.messages import (
    CacheSize,
    KvGroup,
    StepInput,
    StepResult,
    WarmUp,
    WorkerReport,
)
from vllm_di.components.warm_ups import shown
from vllm_di.errors import ConfigError

log = logging.getLogger(__name__)


class _Cost(NamedTuple):
    seconds: float
    memory: int | None
    """Bytes; below 0 where memory was given back."""


class CacheBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How large the KV cache of a rank is."""

    num_blocks: Annotated[int, msgspec.Meta(ge=1)] | None
    """None: by what follows."""
    kv_cache_memory: str | int | None
    """Bytes, or such as ``2GiB``. None: a share of what is free."""
    memory_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)]
    max_num_seqs: Annotated[int, msgspec.Meta(ge=1)]
    max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=1)]


class StandardWorker(Worker):
    """Sizes the KV cache from the config, or from what is free once the weights are in."""

    def __init__(
        self,
        device: Device,
        loader: Loader,
        model: Model,
        kv_layout: KvLayout,
        attention: AttentionBackend,
        limits: SchedulerLimits,
        ops: OpTable,
        program: ModelProgram,
        model_runner: ModelRunner,
        placement: Placement,
        *,
        config: CacheBounds,
    ) -> None:
        if "*" not in attention.layouts and kv_layout.name not in attention.layouts:
            raise ConfigError(
                f"{type(attention).__name__} cannot read the KV layout {kv_layout.name!r}; "
                f"it reads {', '.join(attention.layouts)}; take kv_layout={attention.layouts[0]}"
            )
        check_block_size(attention, kv_layout)
        num_blocks, memory = config.num_blocks, config.kv_cache_memory
        if num_blocks is not None and memory is not None:
            raise ConfigError(
                f"num_blocks ({num_blocks}) and kv_cache_memory ({memory}) both size the KV cache; "
                "give one of them"
            )
        self._device, self._loader, self._model, self._layout = device, loader, model, kv_layout
        self._limits, self._ops, self._runner = limits.report(), ops, model_runner
        self._program = program
        self._placement, self._max_num_seqs = placement, config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._groups: list[KvGroup] = []
        self._block_bytes = 0
        self._compiled = _Cost(0.0, None)
        """What ``prepare`` took."""
        self._num_blocks, self._fraction = num_blocks, config.memory_fraction
        self._memory = None if memory is None else parse_size(memory, "kv_cache_memory")

    def load(self) -> WorkerReport:
        self._check_size_is_known()
        begin = time.perf_counter()
        self._loader.load(self._model)
        self._device.synchronize()
        system.return_freed_memory()  # the checkpoint's tensors, which were packed
        seconds = time.perf_counter() - begin
        model, layout = self._model, self._layout
        memory = self._device.memory()
        details: dict[str, Any] = {
            "role": self._placement.role,
            "rank": self._placement.rank,
            "load_seconds": round(seconds, 3),
            "ops": self._ops.describe(),
            "fusions": list(getattr(self._ops, "fusions", ())),
        }
        if memory is not None:
            details["memory_free"] = memory.free  # bytes, with the weights in, before the cache
            details["memory_total"] = memory.total
        return WorkerReport(
            block_size=layout.block_size,
            kv_specs=model.kv_specs(),
            limits=self._limits,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            device=str(self._device.torch_device),
            dtype=str(model.dtype).removeprefix("torch."),
            weight_bytes=model.weight_bytes(),
            pooling=self._runner.pooling,
            details=details,
        )

    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        self._groups = groups
        before, begin = self._device.memory(), time.perf_counter()
        self._program.prepare(groups)
        self._runner.prepare(groups)
        self._device.synchronize()
        pool = Groups(self._model.kv_specs(), groups).pool
        self._block_bytes = block_bytes = self._layout.bytes_per_block(pool, self._model.dtype)
        memory = self._device.memory()
        self._compiled = _Cost(time.perf_counter() - begin, _taken(before, memory))
        free = None if memory is None else memory.free
        return CacheSize(self._blocks(block_bytes, free), block_bytes)

    def allocate(self, num_blocks: int) -> WarmUp:
        before = self._device.memory()
        self._runner.allocate(self._groups, num_blocks)
        cached, begin = self._device.memory(), time.perf_counter()
        self._runner.warm_up()
        seconds, after = time.perf_counter() - begin, self._device.memory()
        parts = (self._compiled.memory, _taken(cached, after))
        report = WarmUp(
            seconds=round(self._compiled.seconds + seconds, 3),
            num_programs=self._program.num_compiles,
            program_bytes=None if None in parts else max(0, sum(n or 0 for n in parts)),
        )
        log.info("warm-up: %s", shown(report))
        self._check_promise(num_blocks, before, cached, after)
        return report

    def _check_promise(
        self,
        num_blocks: int,
        before: DeviceMemory | None,
        cached: DeviceMemory | None,
        after: DeviceMemory | None,
    ) -> None:
        """Raise ConfigError where what is free after the warm-up is less than the cache will take.
        Memory as it was before the cache was allocated, with the cache, after the warm-up."""
        if before is None or cached is None or after is None:
            return
        # on a host the cache's pages may be taken when they are first used
        promised = num_blocks * self._block_bytes if self._device.on_host else 0
        promised = max(0, promised - max(0, before.free - cached.free))
        if after.free < promised:
            raise ConfigError(
                f"the warm-up left {show_size(after.free)} free, but a KV cache of "
                f"{_counted(num_blocks)} will take {show_size(promised)}; lower "
                f"{self._key_of_size()}",
                key=self._key_of_size(),
            )

    def execute(self, step: StepInput) -> StepResult:
        return self._runner.execute(step)

    def _check_size_is_known(self) -> None:
        """Raise ConfigError where neither the config nor the device can size the cache."""
        if self._num_blocks is None and self._memory is None and self._device.memory() is None:
            raise ConfigError(
                f"must be set (or worker.kv_cache_memory): {type(self._device).__name__} has no "
                "memory report to size the KV cache by",
                key="worker.num_blocks",
            )

    def _blocks(self, block_bytes: int, free: int | None) -> int:
        """As many blocks as asked for; else as many as fit, and never more than full batches of
        full sequences need. Raises ConfigError when not one full sequence fits."""
        reserved = int(self._limits.null_block)
        per_sequence = sum(
            group.most_blocks(
                self._model.max_model_len, self._max_num_batched_tokens, self._layout.block_size
            )
            for group in self._groups
        )
        if self._num_blocks is not None:
            blocks, source = self._num_blocks, "worker.num_blocks"
        else:
            room, source = self._room(free)
            most = per_sequence * self._max_num_seqs + reserved
            blocks = min(room // block_bytes, most) if block_bytes else most
        if blocks < per_sequence + reserved:
            raise ConfigError(
                f"the KV cache has room for {_counted(blocks)} ({source}), but one sequence of "
                f"{self._model.max_model_len} tokens needs {per_sequence + reserved} "
                f"({show_size((per_sequence + reserved) * block_bytes)}); raise "
                f"{self._keys_to_raise()}, or lower model.max_model_len",
                key=self._key_of_size(),
            )
        if free is not None and (wanted := blocks * block_bytes) > free:
            raise ConfigError(
                f"a KV cache of {_counted(blocks)} ({source}) takes {show_size(wanted)}, but "
                f"{show_size(free)} are free; lower it",
                key=self._key_of_size(),
            )
        return blocks

    def _room(self, free: int | None) -> tuple[int, str]:
        """-> (bytes that the cache may take, the key that decides it)."""
        if self._memory is not None:
            return self._memory, "worker.kv_cache_memory"
        assert free is not None, "checked before the weights were read"
        share = f"{self._fraction:g} of {show_size(free)} free memory"
        return int(free * self._fraction), f"worker.memory_fraction: {share}"

    def _key_of_size(self) -> str:
        if self._num_blocks is not None:
            return "worker.num_blocks"
        return "worker.memory_fraction" if self._memory is None else "worker.kv_cache_memory"

    def _keys_to_raise(self) -> str:
        also = ", or set worker.kv_cache_memory"
        return self._key_of_size() + (also if self._num_blocks is self._memory is None else "")


def _taken(before: DeviceMemory | None, after: DeviceMemory | None) -> int | None:
    return None if before is None or after is None else before.free - after.free


def _counted(blocks: int) -> str:
    return f"{blocks} block{'' if blocks == 1 else 's'}"
