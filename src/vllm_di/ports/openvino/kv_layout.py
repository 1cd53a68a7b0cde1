"""The KV cache as OpenVINO's CPU plugin lays it out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vllm_di.components.interfaces import CacheTensor, Device, KvLayout, LayerCache
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.messages import KvSpec
from vllm_di.ports.openvino.paged_attention import BLOCK

PARAMS = 8
"""Bytes of a scale and a zero point, fp32 each."""


class OpenVinoLayout(KvLayout):
    """Floats: [blocks, kv_heads, 32, head_size], the layout ``hnd``.

    Bytes: keys have a scale and a zero point for each channel of a block, in the eight rows before
    its tokens, [blocks, kv_heads, 40, head_size]; values for each token, in the eight bytes before
    its own, [blocks, kv_heads, 32, 8 + head_size]. A value is (byte - zero) * scale.
    """

    block_size = BLOCK

    def __init__(
        self, device: Device, *, dtype: Literal["auto", "float32", "bfloat16", "uint8"]
    ) -> None:
        self.dtype_name, self.device = dtype, device
        self._floats = None
        if dtype != "uint8":
            self._floats = HndLayout(device, block_size=BLOCK, dtype=dtype)
        self.name = "hnd" if self._floats else "openvino_u8"
        self.gathers_blocks = self._floats is not None

    def describe(self, spec: KvSpec, dtype: torch.dtype) -> tuple[CacheTensor, ...]:
        if self._floats is not None:
            return self._floats.describe(spec, dtype)
        heads, size = spec.num_kv_heads, spec.head_size
        return (
            CacheTensor("key", (heads, BLOCK + PARAMS, size), torch.uint8),
            CacheTensor("value", (heads, BLOCK, size + PARAMS), torch.uint8),
        )

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        if self._floats is not None:
            return self._floats.write(cache, k, v, slot_mapping)
        keep = slot_mapping >= 0
        slots, k, v = slot_mapping[keep], k[keep].float(), v[keep].float()
        block, offset = slots // BLOCK, slots % BLOCK
        scale, zero, rows = _rounded(v, -1)
        packed = torch.cat((_bytes(scale), _bytes(zero), rows), -1)  # [tokens, kv_heads, 8 + size]
        cache.value[block, :, offset] = packed
        for one in block.unique():  # a new token may widen the range of a block's channels
            mine = block == one
            tokens = _keys(cache.key[one])  # [kv_heads, 32, head_size]
            tokens[:, offset[mine]] = k[mine].transpose(0, 1)
            used = int(offset[mine].max()) + 1
            scale, zero, rows = _rounded(tokens[:, :used], 1)
            cache.key[one, :, :PARAMS] = torch.cat((_bytes(scale), _bytes(zero)), 1).view(
                cache.key[one, :, :PARAMS].shape
            )
            cache.key[one, :, PARAMS : PARAMS + used] = rows
        return None

    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        if self._floats is not None:
            return self._floats.gather(cache, blocks, length)
        used = blocks[: -(-length // BLOCK)].long()
        values = cache.value[used]  # [blocks, kv_heads, 32, 8 + head_size]
        scale, zero = _params(values[..., :PARAMS]).chunk(2, -1)
        found = (_keys(cache.key[used]), (values[..., PARAMS:].float() - zero) * scale)
        k, v = (x.transpose(1, 2).flatten(0, 1)[:length] for x in found)
        return k, v

    def gather_blocks(self, cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        if self._floats is None:
            return super().gather_blocks(cache, blocks)
        return self._floats.gather_blocks(cache, blocks)


def _rounded(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> scale, zero point and bytes, ranges taken along ``dim``."""
    least, most = x.aminmax(dim=dim, keepdim=True)
    scale = (most - least) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero = -least / scale
    return scale, zero, (x / scale + zero).round_().clamp_(0, 255).to(torch.uint8)


def _keys(packed: Tensor) -> Tensor:
    """[..., 40, head_size] bytes -> [..., 32, head_size] fp32."""
    scale, zero = _params(packed[..., :PARAMS, :].flatten(-2)).chunk(2, -1)
    return (packed[..., PARAMS:, :].float() - zero[..., None, :]) * scale[..., None, :]


def _params(packed: Tensor) -> Tensor:
    """Bytes to the fp32 numbers that they are."""
    return packed.contiguous().view(torch.float32)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
