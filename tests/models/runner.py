"""Runs one sequence through a model as the engine would: blocks out of order, chunks, decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    Communicator,
    Model,
    ModelStep,
    OpTable,
    Placement,
)
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.safetensors import find_files, read_files
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.models.checkpoint import describe
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.models.hf_config import model_fields

BLOCK = 32


def device(dtype: str = "float32") -> HostDevice:
    return HostDevice(threads=2, memory_budget=None, default_dtype=dtype)


def ops(name: str, on: HostDevice) -> OpTable:
    if name == "torch":
        return SelectedOps(TorchOps())
    kernels = CpuOps(on, isa="auto", compile="require", cache=None, rows_for_onednn=None)
    return SelectedOps(kernels)


def attention(name: str, table: OpTable, layout: HndLayout) -> AttentionBackend:
    return SdpaAttention(layout) if name == "sdpa" else PagedAttention(table, layout)


class Running:
    """A model with a cache of its own, fed token by token or chunk by chunk."""

    def __init__(self, model: Model, backend: AttentionBackend, layout: HndLayout) -> None:
        self.model, self.backend, self.layout = model, backend, layout
        blocks = -(-model.max_model_len // BLOCK)
        self.caches = layout.allocate(model.kv_specs(), blocks + 3, torch.float32)
        for cache in self.caches:  # what nobody wrote must not show
            cache.key.fill_(float("nan"))
            cache.value.fill_(float("nan"))
        order = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(0))
        self.table = order[:blocks].to(torch.int32)[None]
        self.length = 0

    def feed(self, token_ids: list[int], hidden: Tensor | None = None) -> Tensor:
        """-> logits [tokens, vocab] of all tokens fed; of a stage that is not the last, its hidden
        states."""
        start, self.length = self.length, self.length + len(token_ids)
        positions = torch.arange(start, self.length)
        slots = self.table[0, positions // BLOCK].long() * BLOCK + positions % BLOCK
        plan = BatchPlan(
            token_ids=torch.tensor(token_ids),
            positions=positions,
            query_start=torch.tensor([0, len(token_ids)], dtype=torch.int32),
            seq_lens=torch.tensor([self.length], dtype=torch.int32),
            block_table=self.table,
            slot_mapping=slots,
            logits_rows=torch.arange(len(token_ids)),
            query_lens_host=[len(token_ids)],
            seq_lens_host=[self.length],
        )
        with torch.inference_mode():
            out = self.model.forward(
                ModelStep(
                    token_ids=plan.token_ids,
                    positions=positions,
                    caches=self.caches,
                    groups=[0] * len(self.caches),
                    metadata=[self.backend.build(plan)],
                    hidden=hidden,
                )
            )
            return self.model.logits(out) if self.model.last else out


def load(
    folder: Path,
    *,
    ops_name: str = "torch",
    attention_name: str = "sdpa",
    communicator: Communicator | None = None,
    **changes: Any,
) -> Running:
    """The native decoder with a checkpoint's weights in fp32."""
    found = describe(str(folder))
    fields = model_fields(found.hf_config, found.generation_config) | changes
    config = DecoderConfig(path=str(folder), dtype="float32", **fields)
    on = device()
    table = ops(ops_name, on)
    layout = HndLayout(on, block_size=BLOCK, dtype="auto")
    backend = attention(attention_name, table, layout)
    model = Decoder(
        on,
        table,
        backend,
        communicator or SingleCommunicator(Placement()),
        NoQuantization(table),
        config=config,
    )
    model.load_weights(read_files(find_files(folder)))
    return Running(model, backend, layout)
