"""One rank, from loading weights to executing steps."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec

from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import (
    AttentionBackend,
    Device,
    KvLayout,
    Loader,
    Model,
    ModelRunner,
    OpTable,
    Placement,
    SchedulerLimits,
    Worker,
)
from vllm_di.components.messages import StepPlan, StepResult, WorkerReport
from vllm_di.errors import ConfigError

GIB = 1024**3


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
        model_runner: ModelRunner,
        placement: Placement,
        *,
        num_blocks: Annotated[int, msgspec.Meta(ge=1)] | None,
        kv_cache_memory: str | int | None,
        memory_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)],
        max_num_seqs: Annotated[int, msgspec.Meta(ge=1)],
    ) -> None:
        if "*" not in attention.layouts and kv_layout.name not in attention.layouts:
            raise ConfigError(
                f"{type(attention).__name__} cannot read the KV layout {kv_layout.name!r}; "
                f"it reads {', '.join(attention.layouts)}"
            )
        self._device, self._loader, self._model, self._layout = device, loader, model, kv_layout
        self._limits, self._ops, self._runner = limits, ops, model_runner
        self._placement, self._max_num_seqs = placement, max_num_seqs
        self._num_blocks, self._fraction = num_blocks, memory_fraction
        self._memory = None if kv_cache_memory is None else parse_size(kv_cache_memory)

    def load(self) -> WorkerReport:
        begin = time.perf_counter()
        self._loader.load(self._model)
        self._device.synchronize()
        seconds = time.perf_counter() - begin
        model, layout = self._model, self._layout
        specs = model.kv_specs()
        block_bytes = layout.bytes_per_block(specs, model.dtype)
        details: dict[str, Any] = {
            "rank": self._placement.rank,
            "load_seconds": round(seconds, 3),
            "ops": self._ops.describe(),
            "fusions": list(getattr(self._ops, "fusions", ())),
        }
        return WorkerReport(
            block_size=layout.block_size,
            num_blocks=self._blocks(block_bytes),
            bytes_per_block=block_bytes,
            kv_specs=specs,
            limits=self._limits.report(),
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            device=str(self._device.torch_device),
            dtype=str(model.dtype).removeprefix("torch."),
            weight_bytes=model.weight_bytes(),
            details=details,
        )

    def allocate(self, num_blocks: int) -> None:
        self._runner.allocate(num_blocks)
        self._runner.warm_up()

    def execute(self, plan: StepPlan) -> StepResult:
        return self._runner.execute(plan)

    def _blocks(self, block_bytes: int) -> int:
        """As many blocks as asked for or as fit, and never more than full batches of full sequences
        need."""
        per_sequence = -(-self._model.max_model_len // self._layout.block_size)
        reserved = int(self._limits.report().null_block)
        if self._num_blocks is not None:
            blocks, source = self._num_blocks, "worker.num_blocks"
        else:
            if self._memory is not None:
                room, source = self._memory, "worker.kv_cache_memory"
            else:
                room = int(self._device.memory().free * self._fraction)
                source = f"memory_fraction {self._fraction} of the device's free memory"
            blocks = min(room // block_bytes, per_sequence * self._max_num_seqs + reserved)
        if blocks < per_sequence + reserved:
            need = (per_sequence + reserved) * block_bytes / GIB
            raise ConfigError(
                f"the KV cache has room for {blocks} blocks ({source}), but one sequence of "
                f"{self._model.max_model_len} tokens needs {per_sequence + reserved} "
                f"({need:.2f} GiB); "
                "raise worker.kv_cache_memory or worker.num_blocks, or lower model.max_model_len"
            )
        return blocks
