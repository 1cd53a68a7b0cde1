"""The KV cache as [blocks, kv_heads, block_size, head_size]: a head's tokens of a block lie side by
side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import Device, KvLayout, LayerCache
from vllm_di.components.messages import KvSpec


class HndLayout(KvLayout):
    """Keys and values in a tensor each, one pair a layer."""

    name = "hnd"

    def __init__(
        self, device: Device, *, block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)], dtype: str
    ) -> None:
        if dtype != "auto":
            device.dtype(dtype)  # refuse early what the device lacks
        self._device, self.block_size, self.dtype_name = device, block_size, dtype

    def bytes_per_block(self, specs: Sequence[KvSpec], dtype: torch.dtype) -> int:
        per_token = sum(2 * spec.num_kv_heads * spec.head_size for spec in specs)
        return per_token * self.block_size * self._dtype(dtype).itemsize

    def allocate(
        self, specs: Sequence[KvSpec], num_blocks: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        def empty(spec: KvSpec) -> Tensor:
            shape = (num_blocks, spec.num_kv_heads, self.block_size, spec.head_size)
            return self._device.zeros(shape, self._dtype(dtype))

        return [LayerCache(empty(spec), empty(spec)) for spec in specs]

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        keep = slot_mapping >= 0
        slots = slot_mapping[keep]
        block = torch.div(slots, self.block_size, rounding_mode="floor")
        offset = slots % self.block_size
        cache.key[block, :, offset] = k[keep].to(cache.key.dtype)
        cache.value[block, :, offset] = v[keep].to(cache.value.dtype)

    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        used = blocks[: -(-length // self.block_size)].long()

        def rows(cached: Tensor) -> Tensor:
            # [blocks, kv_heads, block_size, head_size] -> [length, kv_heads, head_size]
            return cached[used].transpose(1, 2).flatten(0, 1)[:length]

        return rows(cache.key), rows(cache.value)

    def copy_blocks(
        self, caches: Sequence[LayerCache], src: Sequence[int], dst: Sequence[int]
    ) -> None:
        for cache in caches:
            for tensor in (cache.key, cache.value):
                tensor[list(dst)] = tensor[list(src)]

    def _dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype if self.dtype_name == "auto" else self._device.dtype(self.dtype_name)
