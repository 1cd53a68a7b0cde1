"""Weights of a quantised checkpoint in safetensors: the tensors of a linear layer become one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vllm_di.components.loader.formats import FORMATS, LEFT_OUT
from vllm_di.components.loader.scheme import SUPPORTED, Scheme
from vllm_di.components.loader.tensor_files import TensorFiles
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.errors import CheckpointError
from vllm_di.progress import tell

log = logging.getLogger(__name__)

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes of weights that are not quantised."""
MOST_NAMES = 3
"""Of weights that a line shows."""


class QuantizedFiles:
    """``keeps`` says of a weight's name whether the model takes it as it is, ``takes_order``
    whether also in act-order. What it does not take,
    or what has no form that kernels multiply, is dequantised to ``dtype`` where ``may_dequantize``,
    and else refused."""

    def __init__(
        self,
        scheme: Scheme,
        files: list[Path],
        *,
        dtype: torch.dtype,
        keeps: Callable[[str], bool],
        takes_order: bool,
        may_dequantize: bool,
    ) -> None:
        self._scheme, self._files, self._dtype = scheme, files, dtype
        self._keeps, self._may_dequantize = keeps, may_dequantize
        self._takes_order = takes_order
        self._format = FORMATS[scheme.format]
        self._parts = self._format.needed(scheme)
        self._known = self._format.known()

    def read(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """(name, tensor) of every weight, and a line about what became of them. Raises
        CheckpointError naming file and tensor for what is missing, does not fit or is refused."""
        num_kept, num_left_out, widened = 0, 0, list[tuple[str, str]]()
        with TensorFiles(self._files) as tensors:
            done: set[str] = set()
            for name in tensors.names:
                module, _, part = name.rpartition(".")
                if part in LEFT_OUT:
                    num_left_out += 1
                    continue
                if part not in self._known or self._is_plain(module, part, tensors):
                    yield name, tensors.get(name)
                    continue
                if module in done:
                    continue
                done.add(module)
                weight, why = self._weight(module, tensors)
                if why:
                    widened.append((f"{module}.weight", why))
                num_kept += not why
                yield f"{module}.weight", weight
        if not done:
            raise CheckpointError(
                f"{self._files[0]}: config.json says that the weights are quantized "
                f"({self._scheme}), but no tensor is a {self._parts[0]}"
            )
        if num_left_out:
            log.warning(
                "%s: %d scales of activations and of the KV cache are left out: activations are "
                "rounded by scales of their own, or not at all",
                self._scheme,
                num_left_out,
            )
        if num_kept:
            tell(f"{self._scheme}: {num_kept} weights stay as the checkpoint has them")
        if widened:
            some = ", ".join(f"{name} ({why})" for name, why in widened[:MOST_NAMES])
            more = ", ..." if len(widened) > MOST_NAMES else ""
            log.warning(
                "%s: %d weights are dequantised to %s, as loader.dequantize=true allows: %s%s",
                self._scheme,
                len(widened),
                str(self._dtype).removeprefix("torch."),
                some,
                more,
            )

    def _weight(self, module: str, tensors: TensorFiles) -> tuple[Tensor | QuantizedWeight, str]:
        """-> (the weight, why it is dequantised, if so)."""
        name = f"{module}.weight"
        parts = self._tensors_of(module, tensors)
        place = tensors.place(f"{module}.{self._parts[0]}")
        try:
            quantized = self._format.read(self._scheme, parts)
        except ValueError as error:
            raise CheckpointError(
                f"{place}: tensors of {module}: {error} (quantization_config: {self._scheme})"
            ) from None
        why = "" if self._keeps(name) else "the model takes it in floats alone"
        if not why:
            try:
                kept = quantized.keep()
                if kept.order is None or self._takes_order:
                    return kept, ""
                why = "this model or quantization does not multiply weights in act-order"
            except ValueError as error:
                why = str(error)
        if not self._may_dequantize:
            raise CheckpointError(
                f"{place}: {name} is quantized ({self._scheme}) and cannot stay so: {why}; "
                "loader.dequantize=true makes such weights floats of the model's dtype"
            )
        return quantized.dequantize(self._dtype), why

    def _is_plain(self, module: str, part: str, tensors: TensorFiles) -> bool:
        """Whether it is a weight in floats, of a layer that is not quantised."""
        others = (f"{module}.{other}" in tensors for other in self._known if other != part)
        name = f"{module}.{part}"
        return part == "weight" and tensors.dtype(name) in FLOATS and not any(others)

    def _tensors_of(self, module: str, tensors: TensorFiles) -> Mapping[str, Tensor]:
        present = [part for part in self._known if f"{module}.{part}" in tensors]
        if missing := [part for part in self._parts if part not in present]:
            raise CheckpointError(
                f"{tensors.place(f'{module}.{present[0]}')}: tensor {module}.{missing[0]} is "
                f"missing beside {module}.{present[0]}: quantization_config of config.json says "
                f"{self._scheme}, which has {', '.join(self._parts)}; supported are {SUPPORTED}"
            )
        parts = {part: tensors.get(f"{module}.{part}") for part in present}
        for part, tensor in parts.items():
            if tensor.numel() == 0:
                raise CheckpointError(
                    f"{tensors.place(f'{module}.{part}')}: tensor {module}.{part} is empty, of "
                    f"shape {list(tensor.shape)}"
                )
        return parts
