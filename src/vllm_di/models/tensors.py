"""What the native models do alike with the tensors of a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from vllm_di.errors import CheckpointError

Kind = Literal["weight", "norm", "bias"]
INIT_STD = 0.02
"""Standard deviation of random weights: that with which published models begin."""


def check_all_there(missing: Collection[str]) -> None:
    """Raise CheckpointError that names what a checkpoint lacks, unless that is nothing."""
    if names := sorted(missing):
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} tensors: {', '.join(names[:5])}"
            + (", ..." if len(names) > 5 else "")
        )


def check_once(name: str, raw: str, is_new: bool) -> None:
    """Raise CheckpointError for a tensor that came before. ``raw``: its name in the file."""
    if not is_new:
        raise CheckpointError(f"tensor {name} comes twice, once as {raw}")


def check_floats(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a tensor of integers: copied to a weight they would be wrong
    numbers."""
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, expected floats: of "
            "weights in integers quantization_config of config.json must say how they are packed"
        )


def check_shape(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise CheckpointError for a tensor of another shape than ``wanted``."""
    if tuple(shape) != tuple(wanted):
        raise CheckpointError(
            f"tensor {name} has shape {list(shape)}, the config asks for {list(wanted)}"
        )


def random_tensor(
    name: str, seed: int, shape: Sequence[int], kind: Kind, one: float = 1.0
) -> Tensor:
    """fp32 on the host; it depends on its name and the seed alone. A norm is filled with ``one``,
    what changes nothing; a bias with zeros."""
    if kind == "norm":
        return torch.full(tuple(shape), one, dtype=torch.float32)
    if kind == "bias":
        return torch.zeros(tuple(shape), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return torch.empty(tuple(shape), dtype=torch.float32).normal_(0, INIT_STD, generator=generator)
