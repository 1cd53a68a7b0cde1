"""What the layouts with a tensor of keys and one of values for each layer have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import msgspec
import torch

from vllm_di.components.interfaces import CacheTensor, Device, KvLayout
from vllm_di.components.messages import KvSpec


class PairLayout(KvLayout):
    """Blocks first in both tensors, whose shape is the subclass's. ``block_size=auto`` is the
    layout's own; where attention reads some sizes alone, the container puts in one of these."""

    own_block_size: ClassVar[int] = 32

    def __init__(
        self,
        device: Device,
        *,
        block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)] | Literal["auto"],
        dtype: str,
    ) -> None:
        if dtype != "auto":
            device.dtype(dtype)  # refuse early what the device lacks
        self.device, self.dtype_name = device, dtype
        self.block_size = self.own_block_size if block_size == "auto" else block_size

    @abstractmethod
    def shape_of_block(self, spec: KvSpec) -> tuple[int, int, int]:
        """Of one block of one layer's keys, or of its values."""

    def describe(self, spec: KvSpec, dtype: torch.dtype) -> tuple[CacheTensor, ...]:
        kept = dtype if self.dtype_name == "auto" else self.device.dtype(self.dtype_name)
        shape = self.shape_of_block(spec)
        return CacheTensor("key", shape, kept), CacheTensor("value", shape, kept)
