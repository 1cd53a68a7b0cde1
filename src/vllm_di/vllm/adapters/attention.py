"""An AttentionBackend of this project as one of vLLM's, on vLLM's own KV blocks.

A block of vLLM's is one piece of memory, [kv_heads, block_size, 2 * head_size], whose inside is the
backend's. Seen as two blocks of half the size, [kv_heads, block_size, head_size] each, block b
holds its keys in 2 b and its values in 2 b + 1. So the layout ``hnd`` fits without a copy:

    whole = kv_cache.view(2 * blocks, kv_heads, block_size, head_size)
    keys, values = whole[:-1], whole[1:]    # both are read at 2 b
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

from vllm_di.components.interfaces import AttentionSpec, BatchPlan, LayerCache
from vllm_di.errors import ConfigError
from vllm_di.vllm import versions
from vllm_di.vllm.assembled import current
from vllm_di.vllm.errors import plain


@dataclass(slots=True)
class Metadata:
    """What the layers of a step share."""

    inner: Any
    """Of this project's backend."""
    num_actual_tokens: int
    """Rows beyond are padding."""


class Builder(AttentionMetadataBuilder):
    """vLLM's batch as a BatchPlan."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        with plain():
            assembled = current(vllm_config)
            self._size, self._calls = kv_cache_spec.block_size, assembled.calls
            self._attention = assembled.parts.attention
            held = assembled.parts.kv_layout.block_size
            if held != self._size:
                raise ConfigError(
                    f"{assembled.choices.where('attention')}: attention: vLLM's blocks have "
                    f"{self._size} tokens here, and {held} elsewhere in this model; it has layers "
                    "of several kinds, which the adapter does not do"
                )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Metadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError("attention of vllm-di is causal; this batch is not")
        count, slots = batch.num_actual_tokens, batch.slot_mapping[: batch.num_actual_tokens]
        starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        positions = batch.positions
        plan = BatchPlan(
            token_ids=slots,  # no backend reads them, but for their number
            positions=slots if positions is None else positions[:count],
            query_start=batch.query_start_loc[: batch.num_reqs + 1],
            seq_lens=batch.seq_lens[: batch.num_reqs],
            block_table=batch.block_table_tensor[: batch.num_reqs] * 2,
            slot_mapping=torch.where(
                slots < 0, slots, slots + slots // self._size * self._size
            ),  # slot s of block b is s of block 2 b
            logits_rows=slots[:0],
            query_lens_host=[stop - start for start, stop in itertools.pairwise(starts)],
            seq_lens_host=batch.seq_lens[: batch.num_reqs].tolist(),
        )
        self._calls["attention.build"] += 1
        return Metadata(self._attention.build(plan), count)


class Impl(AttentionImpl):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        with plain():
            assembled = current()
            where = assembled.choices.where("attention")
            asked = {"alibi_slopes": alibi_slopes, **more}
            asked["kv_sharing_target_layer_name"] = kv_sharing_target_layer_name
            refused = [name for name, value in asked.items() if value is not None]
            if attn_type != AttentionType.DECODER:
                refused.append(f"attention of type {attn_type}")
            if kv_cache_dtype not in Backend.supported_kv_cache_dtypes:
                refused.append(f"a KV cache of {kv_cache_dtype}")
            if refused:
                raise ConfigError(
                    f"{where}: attention: the model asks for {', '.join(refused)}, which "
                    "attention of vllm-di does not do"
                )
            self.attention = assembled.parts.attention
            self.spec = AttentionSpec(
                num_heads,
                num_kv_heads or num_heads,
                head_size,
                float(scale),
                sliding_window,
                logits_soft_cap or None,
            )
            try:
                self.attention.check(self.spec)
            except ConfigError as error:
                raise ConfigError(f"{where}: attention: {error}") from None
        # read by vLLM
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.sliding_window = self.spec.num_kv_heads, sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self._calls = assembled.calls
        self._cache: tuple[int, LayerCache] | None = None
        """Address of vLLM's cache, and our view of it."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor | None = None,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """query, output [tokens, heads, head_size]; key, value [tokens, kv_heads, head_size]."""
        assert output is not None, "vLLM hands the output in"
        if attn_metadata is None:  # vLLM measures memory, without a cache
            return output.zero_()
        count = attn_metadata.num_actual_tokens
        self._calls["attention.forward"] += 1
        output[:count] = self.attention.forward(
            query[:count],
            key[:count],
            value[:count],
            self._view(kv_cache),
            attn_metadata.inner,
            self.spec,
        ).view_as(output[:count])
        return output

    def _view(self, kv_cache: Tensor) -> LayerCache:
        address = kv_cache.data_ptr()
        if self._cache is None or self._cache[0] != address:
            blocks, heads, size, _ = kv_cache.shape
            whole = kv_cache.view(2 * blocks, heads, size, self.head_size)
            self._cache = address, LayerCache((whole[:-1], whole[1:]))
        return self._cache[1]


class Backend(AttentionBackend):
    """What vLLM asks a backend for."""

    accept_output_buffer = True
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up among its own names

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Asked for before vLLM 0.31."""
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Asked for since vLLM 0.31."""
        return versions.kv_layouts()

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True
