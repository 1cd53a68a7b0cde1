"""The KV cache as [blocks, block_size, kv_heads, head_size]: a token's heads lie side by side."""

from __future__ import annotations

from torch import Tensor

from vllm_di.components.interfaces import LayerCache
from vllm_di.components.kv_layout.pair import PairLayout
from vllm_di.components.messages import KvSpec


class NhdLayout(PairLayout):
    """Keys and values in a tensor each, one pair a layer."""

    name = "nhd"
    own_block_size = 128
    gathers_blocks = True

    def shape_of_block(self, spec: KvSpec) -> tuple[int, int, int]:
        return (self.block_size, spec.num_kv_heads, spec.head_size)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        keep = slot_mapping >= 0
        slots = slot_mapping[keep]
        cache.key.flatten(0, 1)[slots] = k[keep].to(cache.key.dtype)
        cache.value.flatten(0, 1)[slots] = v[keep].to(cache.value.dtype)

    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        used = blocks[: -(-length // self.block_size)].long()
        keys, values = (c[used].flatten(0, 1)[:length] for c in (cache.key, cache.value))
        return keys, values  # [length, kv_heads, head_size]

    def gather_blocks(self, cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x[blocks].flatten(1, 2) for x in cache.tensors)
        return k, v  # [seqs, tokens, kv_heads, head_size]
