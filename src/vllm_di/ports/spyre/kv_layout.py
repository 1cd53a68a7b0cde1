"""The KV cache as Spyre's paged ops take it."""

from __future__ import annotations

from torch import Tensor

from vllm_di.components.interfaces import Device, LayerCache
from vllm_di.components.kv_layout.nhd import NhdLayout
from vllm_di.errors import ConfigError

BLOCK = 64
"""Tokens in a block: the compiler knows no other."""


class SpyreLayout(NhdLayout):
    """[blocks, 64, kv_heads, head_size] for keys, and for values."""

    gathers_blocks = True

    def __init__(self, device: Device, *, block_size: int, dtype: str) -> None:
        if block_size != BLOCK:
            raise ConfigError(
                f"kv_layout.block_size {block_size}: Spyre's compiler takes blocks of {BLOCK} "
                f"tokens alone; set kv_layout.block_size={BLOCK}"
            )
        super().__init__(device, block_size=block_size, dtype=dtype)

    def gather_blocks(self, cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return cache.key[blocks].flatten(1, 2), cache.value[blocks].flatten(1, 2)
