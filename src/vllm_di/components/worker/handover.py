"""A worker whose cache can be handed over to a worker of another role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    Device,
    KvLayout,
    KvTransfer,
    Loader,
    Model,
    ModelProgram,
    ModelRunner,
    OpTable,
    Placement,
    SchedulerLimits,
)
from vllm_di.components.messages import KvParcel, KvPart, KvSpan
from vllm_di.components.remote import remote
from vllm_di.components.worker.standard import CacheBounds, StandardWorker
from vllm_di.errors import ConfigError, EngineDeadError, PortError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""In which values cross."""


class HandoverWorker(StandardWorker):
    """Reads blocks of its cache into the neutral form of a ``KvParcel`` and writes such parcels
    into its own blocks: whatever the layout, the block size, the dtype and the share of the
    heads are on either side."""

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
        kv_transfer: KvTransfer,
        *,
        config: CacheBounds,
    ) -> None:
        super().__init__(
            device,
            loader,
            model,
            kv_layout,
            attention,
            limits,
            ops,
            program,
            model_runner,
            placement,
            config=config,
        )
        self._transfer = kv_transfer
        self._parts: list[KvPart] = []
        self._group_of: dict[int, int] = {}
        """Layer to its KvGroup, over all stages."""

    @remote
    def kv_open(self, session: bytes, heads: dict[int, int]) -> list[KvPart]:
        """Called once, after ``allocate``. ``heads``: layer to its KV heads over all ranks. -> what
        this worker holds. Raises ConfigError for a cache whose values have no plain float form, and
        for one that cannot be written."""
        if self._placement.node is not None:
            self._transfer.settle(self._placement.node.address)
        self._transfer.open(session)
        self._refuse_copies()
        self._group_of = {
            layer: index for index, group in enumerate(self._groups) for layer in group.layers
        }
        rank, world = self._placement.rank, self._placement.world_size
        for spec, cache in zip(self._model.kv_specs(), self._program.caches, strict=True):
            keys, _ = self._layout.gather(cache, self._table([0]), 1)
            dtype = str(keys.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise ConfigError(
                    f"{type(self._layout).__name__} gives values in {dtype}, and a cache is handed "
                    f"over in {', '.join(DTYPES)}",
                    key="kv_layout",
                )
            total, own = heads[spec.layer], spec.num_kv_heads
            # with fewer heads than ranks, ranks side by side hold the same one
            first = rank * own if own * world == total else rank // (world // total)
            self._parts.append(KvPart(spec.layer, first, own, spec.head_size, dtype))
        return self._parts

    def _refuse_copies(self) -> None:
        """Raise ConfigError for a program whose ``caches`` are copies: what another worker hands
        over would be lost, and the tokens behind it wrong."""
        for cache in self._program.caches[:1]:  # nothing is in it yet
            first = self._table([0])
            before = [x.clone() for x in self._layout.gather(cache, first, 1)]
            ones = torch.ones_like(before[0])
            with torch.inference_mode():
                self._layout.write(cache, ones, ones, first)
                found, _ = self._layout.gather(self._program.caches[0], first, 1)
                is_lost = not torch.allclose(found, ones, atol=0.1)
                self._layout.write(cache, before[0], before[1], first)
            if is_lost:
                raise ConfigError(
                    f"{type(self._program).__name__} gives copies of its cache: what another "
                    "worker hands over to it would be lost; take a platform of one role",
                    key="program",
                )

    @remote
    def kv_offer(self, spans: list[KvSpan], taken: list[str]) -> KvParcel:
        """Copy these tokens out, of every layer that this worker holds. ``taken``: tickets of
        earlier parcels that nobody will ask for again."""
        for ticket in taken:
            self._transfer.withdraw(ticket)
        counts = _num_tokens(spans)
        sizes = [self._size(part, counts) for part in self._parts]
        ticket, memory = self._transfer.offer(max(1, sum(sizes)))
        at = 0
        with torch.inference_mode():
            for part, size, cache in zip(self._parts, sizes, self._program.caches, strict=True):
                group = self._group_of[part.layer]
                pairs = [
                    self._layout.gather(cache, self._table(span.blocks), span.length)
                    for span in spans
                    if span.group == group
                ]
                for half in (0, 1) if size else ():
                    for pair in pairs:
                        values = pair[half].reshape(-1)
                        end = at + values.numel() * values.element_size()
                        _floats(memory[at:end], part.dtype).copy_(values)
                        at = end
        return KvParcel(ticket, self._parts)

    @remote
    def kv_take(self, spans: list[KvSpan], parcels: list[KvParcel]) -> str:
        """Write the parcels of all workers of the other side into these blocks -> nothing, or why
        they could not be had: then the blocks may hold anything."""
        try:
            with ExitStack() as stack:
                memory = [stack.enter_context(self._transfer.take(p.ticket)) for p in parcels]
                self._write(spans, parcels, memory)
        except (EngineDeadError, PortError) as error:
            return str(error)
        return ""

    def _write(
        self, spans: list[KvSpan], parcels: list[KvParcel], memory: Sequence[memoryview]
    ) -> None:
        counts = _num_tokens(spans)
        slots = {
            group: torch.cat([self._slots(span) for span in spans if span.group == group])
            for group in counts
        }
        found: dict[int, list[tuple[KvPart, Tensor]]] = {part.layer: [] for part in self._parts}
        for parcel, data in zip(parcels, memory, strict=True):
            at = 0
            for part in parcel.parts:
                end = at + self._size(part, counts)
                if end > at and part.layer in found:
                    shape = (2, -1, part.num_heads, part.head_size)
                    values = _floats(data[at:end], part.dtype).view(shape)
                    found[part.layer].append((part, values))
                at = end
        with torch.inference_mode():
            for own, cache in zip(self._parts, self._program.caches, strict=True):
                group = self._group_of[own.layer]
                if group in counts:
                    values = _of_heads(own, found[own.layer]).to(self._device.torch_device)
                    self._layout.write(cache, values[0], values[1], slots[group])
        self._device.synchronize()

    def _size(self, part: KvPart, counts: Mapping[int, int]) -> int:
        """Bytes of one part of a parcel."""
        tokens = counts.get(self._group_of[part.layer], 0)
        return 2 * tokens * part.num_heads * part.head_size * DTYPES[part.dtype].itemsize

    def _table(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._device.torch_device)

    def _slots(self, span: KvSpan) -> Tensor:
        """[length] slots of a span's tokens; -1 for those that are not to be written."""
        blocks, size = self._table(span.blocks), self._layout.block_size
        offsets = torch.arange(size, dtype=torch.int64, device=blocks.device)
        slots = torch.where(blocks[:, None] < 0, -1, blocks[:, None] * size + offsets)
        return slots.flatten()[: span.length]


def _num_tokens(spans: Sequence[KvSpan]) -> dict[int, int]:
    """Of each KvGroup."""
    counts: dict[int, int] = {}
    for span in spans:
        counts[span.group] = counts.get(span.group, 0) + span.length
    return counts


def _floats(memory: memoryview, dtype: str) -> Tensor:
    """A piece of an offer's memory as a flat tensor."""
    return torch.frombuffer(memory, dtype=torch.uint8).view(DTYPES[dtype])


def _of_heads(own: KvPart, found: Sequence[tuple[KvPart, Tensor]]) -> Tensor:
    """Keys and values of a worker's own heads, [2, tokens, heads, head size], out of what the
    workers of the other side hold of the layer. Raises PortError where a head is not there."""
    pieces, head, end = [], own.first_head, own.first_head + own.num_heads
    while head < end:
        for part, values in found:
            offset = head - part.first_head
            if 0 <= offset < part.num_heads and part.head_size == own.head_size:
                count = min(part.num_heads - offset, end - head)
                pieces.append(values[:, :, offset : offset + count])
                head += count
                break
        else:
            raise PortError(f"no parcel holds head {head} of layer {own.layer}")
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
