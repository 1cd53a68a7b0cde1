"""Workers that hand their KV cache over with a flaw."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import LayerCache
from vllm_di.components.messages import KvParcel, KvPart, KvSpan
from vllm_di.components.program.eager import EagerProgram
from vllm_di.components.remote import remote
from vllm_di.components.worker.handover import HandoverWorker


class LastBlockOff(HandoverWorker):
    """The tokens of a block that is not full are written one place behind their own."""

    def _slots(self, span: KvSpan) -> Tensor:
        slots = super()._slots(span)
        partial = span.length % self._layout.block_size
        if partial:
            slots[-partial:] = slots[-partial:].roll(1)
        return slots


class WholeBlocksAlone(HandoverWorker):
    """What is in a block that is not full is not written."""

    def _slots(self, span: KvSpan) -> Tensor:
        slots = super()._slots(span)
        whole = span.length - span.length % self._layout.block_size
        slots[whole:] = -1
        return slots


class WritesBeyond(HandoverWorker):
    """A block that is not full is filled up with its last token."""

    def _write(
        self, spans: list[KvSpan], parcels: list[KvParcel], memory: Sequence[memoryview]
    ) -> None:
        super()._write(spans, parcels, memory)
        for cache, part in zip(self._program.caches, self._parts, strict=True):
            for span in spans:
                length = len(span.blocks) * self._layout.block_size
                if span.group == self._group_of[part.layer] and length > span.length:
                    table = self._table(span.blocks)
                    found = self._layout.gather(cache, table, span.length)
                    rest = self._slots(KvSpan(span.group, span.blocks, length))[span.length :]
                    last = [x[-1:].expand(len(rest), -1, -1) for x in found]
                    with torch.inference_mode():
                        self._layout.write(cache, last[0], last[1], rest)


class HeadsSwapped(HandoverWorker):
    """Each of two ranks says that it holds the other's heads."""

    @remote
    def kv_open(self, session: bytes, heads: dict[int, int]) -> list[KvPart]:
        self._parts = [
            msgspec.structs.replace(
                part, first_head=heads[part.layer] - part.num_heads - part.first_head
            )
            for part in super().kv_open(session, heads)
        ]
        return self._parts


class GroupLost(HandoverWorker):
    """Blocks of the first group alone arrive."""

    @remote
    def kv_take(self, spans: list[KvSpan], parcels: list[KvParcel]) -> str:
        lost = [
            one if one.group == 0 else KvSpan(one.group, [-1] * len(one.blocks), one.length)
            for one in spans
        ]
        return super().kv_take(lost, parcels)


class RoundsTwice(HandoverWorker):
    """Values go through bfloat16, whatever they are on either side."""

    def _write(
        self, spans: list[KvSpan], parcels: list[KvParcel], memory: Sequence[memoryview]
    ) -> None:
        rounded = []
        for parcel, data in zip(parcels, memory, strict=True):
            dtype = getattr(torch, parcel.parts[0].dtype)
            values = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
            narrow = values.to(torch.bfloat16).to(dtype)
            rounded.append(memoryview(bytearray(narrow.view(torch.uint8).numpy().tobytes())))
        super()._write(spans, parcels, rounded)


class LayersSwapped(HandoverWorker):
    """The values of a layer are written to the one before it."""

    def _write(
        self, spans: list[KvSpan], parcels: list[KvParcel], memory: Sequence[memoryview]
    ) -> None:
        layers = [part.layer for part in self._parts]
        other = dict(zip(layers, [*layers[1:], layers[0]], strict=True))
        moved = [
            msgspec.structs.replace(
                parcel,
                parts=[msgspec.structs.replace(p, layer=other[p.layer]) for p in parcel.parts],
            )
            for parcel in parcels
        ]
        super()._write(spans, moved, memory)


class CopiedCaches(EagerProgram):
    """What is written to its caches is lost. It says so at the start, which is no flaw."""

    @property
    def caches(self) -> Sequence[LayerCache]:
        return [LayerCache(tuple(t.clone() for t in c.tensors)) for c in self._caches]
