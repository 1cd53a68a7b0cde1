"""Attention on the Triton kernels alone."""

from __future__ import annotations

from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.interfaces import AttentionSpec, KvLayout, OpTable
from vllm_di.components.ops.triton import LARGEST_HEAD, TritonOps
from vllm_di.errors import ConfigError


class TritonAttention(PagedAttention):
    """Paged attention that requires ``ops=triton`` for its two ops, and checks their limits."""

    def __init__(self, ops: OpTable, kv_layout: KvLayout) -> None:
        super().__init__(ops, kv_layout)
        for op in ("write_kv", "paged_attention"):
            owner = ops.library_of(op)
            if not isinstance(owner, TritonOps):
                raise ConfigError(
                    f"attention=triton runs the kernels of ops=triton, but ops.{op} is "
                    f"{type(owner).__name__}'s; choose ops.{op}=triton, or attention=paged, which "
                    "takes any library's"
                )

    def check(self, spec: AttentionSpec) -> None:
        super().check(spec)
        if spec.head_size > LARGEST_HEAD:
            raise ConfigError(
                f"attention=triton has head sizes up to {LARGEST_HEAD}, not {spec.head_size}; "
                "choose attention=sdpa"
            )
