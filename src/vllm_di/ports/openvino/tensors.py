"""Host tensors between torch and OpenVINO, without a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_di.ports.openvino.device import load_openvino


def to_openvino(tensor: Tensor) -> Any:
    """An ``openvino.Tensor`` on the memory of a contiguous host tensor. A request that it is given
    to does not keep that memory: the caller must."""
    ov = load_openvino()
    if tensor.dtype != torch.bfloat16:
        return ov.Tensor(tensor.numpy(), shared_memory=True)
    return ov.Tensor(tensor.view(torch.float16).numpy(), list(tensor.shape), ov.Type.bf16)


def to_torch(tensor: Any) -> Tensor:
    """A copy of an ``openvino.Tensor``: its memory is used again by the next inference."""
    if tensor.element_type.get_type_name() != "bf16":
        return torch.from_numpy(tensor.data).clone()
    return torch.from_numpy(tensor.data.view("int16")).view(torch.bfloat16).clone()
