"""Tensors to JAX's arrays and back. Imported late, for JAX's sake."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: jnp.float32,
    torch.bfloat16: jnp.bfloat16,
    torch.int64: jnp.int32,  # JAX has no others, unless the whole process is told so
    torch.int32: jnp.int32,
    torch.uint8: jnp.uint8,
    torch.bool: jnp.bool_,
}


def to_numpy(tensor: Tensor) -> Any:
    """In JAX's dtypes; the memory is shared where no other dtype stands for it."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy().astype(DTYPES[tensor.dtype], copy=False)


def to_jax(tensor: Tensor) -> Any:
    """A copy on JAX's first device."""
    return jnp.array(to_numpy(tensor))


def to_torch(array: Any) -> Tensor:
    """A copy on the host, once the array is there."""
    found = np.array(jax.device_get(array))
    if found.dtype == jnp.bfloat16:
        return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(found)
