"""Ops of this project in vLLM's layers. A class has the name of vLLM's layer that it replaces.

In eager mode a layer calls the op table. In compiled mode it calls a torch op of the same work
(``traced.py``), which the compiler does not look into.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.layers import activation, layernorm
from vllm.model_executor.layers.rotary_embedding import base as rotary

from vllm_di.errors import ConfigError
from vllm_di.vllm.adapters import traced
from vllm_di.vllm.assembled import current
from vllm_di.vllm.errors import plain

WAYS = ("cpu", "cuda", "hip", "xpu", "tpu", "oot", "native")
"""vLLM's layers have a forward for each kind of platform; here there is one."""


class _Ours:
    """A layer that calls an op of this project, whatever platform vLLM dispatches for."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for way in WAYS:
            setattr(cls, f"forward_{way}", cls.run)

    def run(self, *arguments: Any, **more: Any) -> Any:
        raise NotImplementedError

    def take(self) -> None:
        """Find the ops; called at the end of a constructor."""
        with plain():
            self.ops = traced.calls_of(current())

    def refuse(self, what: str) -> None:
        """Raise VllmSlotError for a form of the layer that no op does."""
        with plain():
            where = current().choices.where("ops")
            raise ConfigError(f"{where}: ops: the model has {what}, which vllm-di has no op for")


class RMSNorm(_Ours, layernorm.RMSNorm):
    """``rms_norm``, and ``add_rms_norm`` where a residual is added."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.variance_size_override is not None or not self.has_weight:
            self.refuse("an RMSNorm over a part of the row or without weight")
        self.take()

    def run(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x, residual [..., hidden] -> the norm, or (the norm of the sum, the sum)."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight.data, self.variance_epsilon)
        return self.ops.add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)


class SiluAndMul(_Ours, activation.SiluAndMul):
    """``silu_and_mul``."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.take()

    def run(self, x: Tensor) -> Tensor:
        """x [..., 2 d] -> [..., d]."""
        return self.ops.silu_and_mul(x)


class GeluAndMul(_Ours, activation.GeluAndMul):
    """``gelu_tanh_and_mul``."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.approximate != "tanh":
            self.refuse("a GeluAndMul that is not approximated by tanh")
        self.take()

    def run(self, x: Tensor) -> Tensor:
        """x [..., 2 d] -> [..., d]."""
        return self.ops.gelu_tanh_and_mul(x)


class RotaryEmbedding(_Ours, rotary.RotaryEmbedding):
    """``rotary_embedding``, with a table in fp32."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.take()
        table = self._compute_cos_sin_cache().float().contiguous()
        self.register_buffer("table", table, persistent=False)

    def run(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """positions [tokens]; query, key [tokens, heads * head_size]."""
        if key is None or more.get("offsets") is not None:
            self.refuse("rotary embedding of queries alone or with offsets")
        assert key is not None
        return self.ops.rotary_embedding(
            positions.flatten(), query, key, self.table, self.head_size, not self.is_neox_style
        )
