"""The KV cache as the TPU's ragged paged attention lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import CacheTensor, Device, KvLayout, LayerCache
from vllm_di.components.messages import KvSpec
from vllm_di.errors import ConfigError

LANES = 128
"""Width of a TPU's registers: a head takes a whole number of them."""


class TpuLayout(KvLayout):
    """One tensor a layer, [blocks, block_size, 2 * kv_heads / packing, packing, head_size], in
    memory with the head size rounded up to 128. A token's heads stand there as k0 v0 k1 v1 ...;
    ``packing`` of them share 32 bits: 2 in bfloat16, 1 in float32."""

    name = "tpu"
    gathers_blocks = True

    def __init__(
        self, device: Device, *, block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    ) -> None:
        if block_size % 2:
            raise ConfigError(
                f"kv_layout.block_size {block_size}: a TPU packs pairs of tokens; take a multiple "
                "of 2"
            )
        self.device, self.block_size = device, block_size

    def describe(self, spec: KvSpec, dtype: torch.dtype) -> tuple[CacheTensor, ...]:
        packing, lanes = 4 // dtype.itemsize, -(-spec.head_size // LANES) * LANES
        shape = (self.block_size, 2 * spec.num_kv_heads // packing, packing, lanes)
        return (CacheTensor("kv", shape, dtype),)

    def allocate(
        self, specs: Sequence[KvSpec], num_blocks: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        """As KvLayout: views of what is described, without what rounds the head size up."""
        whole = super().allocate(specs, num_blocks, dtype)
        return [
            LayerCache((cache.tensors[0][..., : spec.head_size],))
            for spec, cache in zip(specs, whole, strict=True)
        ]

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        keep = slot_mapping >= 0
        slots = slot_mapping[keep]
        block = torch.div(slots, self.block_size, rounding_mode="floor")
        kept = cache.tensors[0]  # [..., heads / packing, packing, head_size]
        pairs = torch.stack((k[keep], v[keep]), 2).view(len(slots), *kept.shape[2:])
        kept[block, slots % self.block_size] = pairs.to(kept.dtype)

    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        used = blocks[: -(-length // self.block_size)].long()
        pairs = cache.tensors[0][used].flatten(0, 1).flatten(1, 2)[:length]
        return pairs[:, 0::2], pairs[:, 1::2]

    def gather_blocks(self, cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        pairs = cache.tensors[0][blocks].flatten(1, 2).flatten(2, 3)
        return pairs[:, :, 0::2], pairs[:, :, 1::2]
