"""The KV cache as [blocks, block_size, kv_heads, head_size]: a token's heads lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import Device, KvLayout, LayerCache
from vllm_di.components.messages import KvSpec


class NhdLayout(KvLayout):
    """Keys and values in a tensor each, one pair a layer."""

    name = "nhd"

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
            shape = (num_blocks, self.block_size, spec.num_kv_heads, spec.head_size)
            return self._device.zeros(shape, self._dtype(dtype))

        return [LayerCache(empty(spec), empty(spec)) for spec in specs]

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        keep = slot_mapping >= 0
        slots = slot_mapping[keep]
        cache.key.flatten(0, 1)[slots] = k[keep].to(cache.key.dtype)
        cache.value.flatten(0, 1)[slots] = v[keep].to(cache.value.dtype)

    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        used = blocks[: -(-length // self.block_size)].long()
        keys, values = (c[used].flatten(0, 1)[:length] for c in (cache.key, cache.value))
        return keys, values  # [length, kv_heads, head_size]

    def copy_blocks(
        self, caches: Sequence[LayerCache], src: Sequence[int], dst: Sequence[int]
    ) -> None:
        for cache in caches:
            cache.key[list(dst)] = cache.key[list(src)]
            cache.value[list(dst)] = cache.value[list(src)]

    def _dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype if self.dtype_name == "auto" else self._device.dtype(self.dtype_name)
