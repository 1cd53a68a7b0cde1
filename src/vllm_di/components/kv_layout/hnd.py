"""The KV cache as [blocks, kv_heads, block_size, head_size]: a head's tokens of a block lie side by
side."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_di.components.interfaces import LayerCache
from vllm_di.components.kv_layout.pair import PairLayout
from vllm_di.components.messages import KvSpec


class HndLayout(PairLayout):
    """Keys and values in a tensor each, one pair a layer."""

    name = "hnd"
    gathers_blocks = True

    def shape_of_block(self, spec: KvSpec) -> tuple[int, int, int]:
        return (spec.num_kv_heads, self.block_size, spec.head_size)

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

    def gather_blocks(self, cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        # [seqs, columns, kv_heads, block_size, head_size] -> [seqs, tokens, kv_heads, head_size]
        k, v = (x[blocks].transpose(2, 3).flatten(1, 2) for x in cache.tensors)
        return k, v
