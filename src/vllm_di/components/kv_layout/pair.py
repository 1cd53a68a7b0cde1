"""What the layouts with a tensor of keys and one of values for each layer have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import msgspec
import torch

from vllm_di.components.interfaces import CacheTensor, Device, KvLayout
from vllm_di.components.messages import KvSpec


class PairLayout(KvLayout):
    """Blocks first in both tensors, whose shape is the subclass's."""

    def __init__(
        self, device: Device, *, block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)], dtype: str
    ) -> None:
        if dtype != "auto":
            device.dtype(dtype)  # refuse early what the device lacks
        self.device, self.block_size, self.dtype_name = device, block_size, dtype

    @abstractmethod
    def shape_of_block(self, spec: KvSpec) -> tuple[int, int, int]:
        """Of one block of one layer's keys, or of its values."""

    def describe(self, spec: KvSpec, dtype: torch.dtype) -> tuple[CacheTensor, ...]:
        kept = dtype if self.dtype_name == "auto" else self.device.dtype(self.dtype_name)
        shape = self.shape_of_block(spec)
        return CacheTensor("key", shape, kept), CacheTensor("value", shape, kept)
