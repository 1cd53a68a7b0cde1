"""The quantization of this project in vLLM's linear layers and its head: weights packed or rounded
once, after loading, and products by the op table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_di.vllm import versions
from vllm_di.vllm.adapters import traced
from vllm_di.vllm.assembled import current
from vllm_di.vllm.errors import plain


class LinearMethod(UnquantizedLinearMethod):
    """One linear layer."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        with plain():
            assembled = current()
        self._name = f"{assembled.key}.{prefix}"
        self._parts, self._calls = assembled.parts, assembled.calls
        compiled = versions.is_compiled(versions.current_config())
        self._op = traced.linear_op() if compiled else None  # it is defined before it is traced
        self._outputs = 0
        self._product: Any = None

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = layer.weight.data
        self._outputs = weight.shape[0]
        product = self._parts.quantization.linear(weight, None)

        def counted(x: Tensor) -> Tensor:
            self._calls["linear"] += 1
            return product(x.flatten(0, -2)).view(*x.shape[:-1], self._outputs)

        self._product = counted
        if self._op is not None:
            self._op.held[self._name] = counted
        # the product keeps what it needs of it
        layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]. The bias is vLLM's to give: one rank alone adds it."""
        if self._op is None:
            found = self._product(x)
        else:
            found = self._op.linear(self._name, x, self._outputs)
        return found if bias is None else found + bias


class HeadMethod(UnquantizedEmbeddingMethod):
    """The head; its weight stays, since the embedding may share it."""

    def __init__(self) -> None:
        with plain():
            assembled = current()
        self._parts, self._calls = assembled.parts, assembled.calls
        self._product: Any = None

    def process_weights_after_loading(self, layer: Any) -> None:
        if isinstance(layer, ParallelLMHead):
            self._product = self._parts.quantization.linear(layer.weight.data, None)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, hidden] -> [tokens, vocabulary]; outside of what vLLM compiles."""
        if self._product is None:  # an embedding that is the head as well
            self._product = self._parts.quantization.linear(layer.weight.data, None)
        self._calls["head"] += 1
        found: Tensor = self._product(x)
        return found if bias is None else found + bias


class Products(QuantizationConfig):
    """What vLLM takes for a quantization."""

    def get_name(self) -> Any:
        return "vllm_di"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Products:
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """None leaves a layer to vLLM: experts and attention's cache are no linear layers."""
        if isinstance(layer, LinearBase):
            return LinearMethod(prefix)
        return HeadMethod() if isinstance(layer, VocabParallelEmbedding) else None
