"""What the layouts with a tensor of keys and one of values for each layer have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.interfaces import Device, KvLayout, LayerCache
from vllm_di.components.messages import KvSpec


class PairLayout(KvLayout):
    """Blocks first in both tensors, whose shape is the subclass's."""

    def __init__(
        self, device: Device, *, block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)], dtype: str
    ) -> None:
        if dtype != "auto":
            device.dtype(dtype)  # refuse early what the device lacks
        self._device, self.block_size, self.dtype_name = device, block_size, dtype

    @abstractmethod
    def shape_of_block(self, spec: KvSpec) -> tuple[int, int, int]:
        """Of one block of one layer's keys, or of its values."""

    def bytes_per_block(self, specs: Sequence[KvSpec], dtype: torch.dtype) -> int:
        per_token = sum(2 * spec.num_kv_heads * spec.head_size for spec in specs)
        return per_token * self.block_size * self._dtype(dtype).itemsize

    def allocate(
        self, specs: Sequence[KvSpec], num_blocks: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        def empty(spec: KvSpec) -> Tensor:
            return self._device.zeros((num_blocks, *self.shape_of_block(spec)), self._dtype(dtype))

        return [LayerCache(empty(spec), empty(spec)) for spec in specs]

    def copy_blocks(
        self, caches: Sequence[LayerCache], src: Sequence[int], dst: Sequence[int]
    ) -> None:
        for cache in caches:
            for tensor in (cache.key, cache.value):
                tensor[list(dst)] = tensor[list(src)]

    def _dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype if self.dtype_name == "auto" else self._device.dtype(self.dtype_name)
