"""Hidden states on their way between the stages of a pipeline."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vllm_di.components.messages import HiddenStates


def pack(hidden: Tensor) -> HiddenStates:
    """hidden [tokens, hidden], on any device, as plain data."""
    host = hidden.detach().to("cpu").contiguous()
    return HiddenStates(
        num_tokens=host.shape[0],
        hidden_size=host.shape[1],
        dtype=str(host.dtype).removeprefix("torch."),
        data=host.view(torch.uint8).numpy().tobytes(),
    )


class HiddenBuffer:
    """Where a stage finds what the stage before left it: always at one address, so that recorded
    steps can be replayed."""

    def __init__(
        self, max_num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape, self._dtype, self._there = (hidden_size,), dtype, device
        self._allocate(max_num_tokens)

    def _allocate(self, rows: int) -> None:
        self._host = torch.zeros(rows, *self._shape, dtype=self._dtype)
        self._bytes = self._host.view(torch.uint8).view(-1).numpy()
        self._device = None if self._there == self._host.device else self._host.to(self._there)

    def blank(self, padded: int) -> Tensor:
        """[padded, hidden] of zeros, for warm-up: the longest shape says how long it has to be."""
        if padded > len(self._host):
            self._allocate(padded)
        self._host[:padded].zero_()
        return self._on_device(padded)

    def fill(self, states: HiddenStates, padded: int) -> Tensor:
        """-> [padded, hidden]; rows beyond the tokens are zero."""
        dtype, size = str(self._host.dtype).removeprefix("torch."), self._host.shape[1]
        if (states.dtype, states.hidden_size) != (dtype, size):
            raise ValueError(
                f"hidden states of {states.hidden_size} {states.dtype} came from the stage before, "
                f"where {size} {dtype} are expected"
            )
        self._bytes[: len(states.data)] = np.frombuffer(states.data, np.uint8)
        self._host[states.num_tokens : padded].zero_()
        return self._on_device(padded)

    def _on_device(self, padded: int) -> Tensor:
        if self._device is None:
            return self._host[:padded]
        return self._device[:padded].copy_(self._host[:padded])
