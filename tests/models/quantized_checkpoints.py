"""Small random checkpoints whose linear weights are written as quantisation tools write them.

Written from the formats' descriptions, one word at a time, apart from the code that reads them. The
integers and scales are random: what quantiser chose them does not matter to a reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tests.models.checkpoints import make
from torch import Tensor

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
"""Whole groups of 64 and 128 in some matrices, several in others."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Grid:
    """A random quantised weight: w = scale * (q - zero)."""

    q: np.ndarray  # [out, in]
    scale: np.ndarray  # [out, groups] fp32, exact in the kind's dtype
    zero: np.ndarray  # [out, groups]
    group_of: np.ndarray  # [in]

    @property
    def weight(self) -> Tensor:
        scale = self.scale.astype(np.float64)[:, self.group_of]
        return torch.from_numpy(scale * (self.q - self.zero[:, self.group_of])).float()


@dataclass
class SmallFloats:
    """A random weight of fp8: w = scale * value."""

    value: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # what it is multiplied by, in any shape
    wide: Tensor  # [out, in] the scale of each

    @property
    def weight(self) -> Tensor:
        return self.value.float() * self.wide


Drawn = Any
"""A Grid or SmallFloats."""


@dataclass
class Kind:
    """One scheme, and how it is written."""

    config: dict[str, Any]
    write: Callable[[Drawn, int], dict[str, Tensor]]
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    act_order: bool = False
    scale: torch.dtype = torch.float16
    draw: Callable[[np.random.Generator, Any, Tensor], Drawn] | None = None
    """None: a Grid."""


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] -> [n, m * bits / 32] int32; the first of a word in its lowest bits, or that at
    order[0]."""
    count = 32 // bits
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns // count) * count), np.uint64)
    padded[:, :columns] = values.astype(np.int64) & (2**bits - 1)
    packed = np.zeros((rows, padded.shape[1] // count), np.uint64)
    for word in range(packed.shape[1]):
        for place in range(count):
            at = place if order is None else order[place]
            packed[:, word] |= padded[:, word * count + at] << np.uint64(bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def awq(grid: Grid, bits: int) -> dict[str, Tensor]:
    return {
        "qweight": words(grid.q.T, bits, AWQ_ORDER),
        "qzeros": words(grid.zero.T, bits, AWQ_ORDER),
        "scales": torch.from_numpy(grid.scale.T.copy()).half(),
    }


def gptq(grid: Grid, bits: int, offset: int = 1) -> dict[str, Tensor]:
    return {
        "qweight": words(grid.q, bits).t().contiguous(),
        "qzeros": words(grid.zero.T - offset, bits),
        "scales": torch.from_numpy(grid.scale.T.copy()).half(),
        "g_idx": torch.from_numpy(grid.group_of.astype(np.int32)),
    }


def gptq_v2(grid: Grid, bits: int) -> dict[str, Tensor]:
    return gptq(grid, bits, 0)


def packed(grid: Grid, bits: int) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized, symmetric: half the range is added to signed integers."""
    return {
        "weight_packed": words(grid.q, bits),
        "weight_scale": torch.from_numpy(grid.scale.copy()).bfloat16(),
        "weight_shape": torch.tensor(grid.q.shape),
    }


def packed_asym(grid: Grid, bits: int) -> dict[str, Tensor]:
    points = words(grid.zero.T, bits).t().contiguous()
    return packed(grid, bits) | {"weight_zero_point": points}


def packed_order(grid: Grid, bits: int) -> dict[str, Tensor]:
    order = torch.from_numpy(grid.group_of.astype(np.int32))
    return packed(grid, bits) | {"weight_g_idx": order}


def int8(grid: Grid, bits: int) -> dict[str, Tensor]:
    half = 2 ** (bits - 1)
    return {
        "weight": torch.from_numpy((grid.q - half).astype(np.int8)),
        "weight_scale": torch.from_numpy(grid.scale.copy()).bfloat16(),
    }


def int8_asym(grid: Grid, bits: int) -> dict[str, Tensor]:
    point = torch.from_numpy((grid.zero - 2 ** (bits - 1)).astype(np.int8))
    return int8(grid, bits) | {"weight_zero_point": point}


def fp8(made: SmallFloats, bits: int) -> dict[str, Tensor]:
    return {
        "weight": made.value,
        "weight_scale": made.scale,
        "input_scale": torch.tensor(0.01),
    }


def fp8_inv(made: SmallFloats, bits: int) -> dict[str, Tensor]:
    return {"weight": made.value, "weight_scale_inv": made.scale}


def small_floats(
    *, block: tuple[int, int] | None = None, rows: bool = False
) -> Callable[[np.random.Generator, Kind, Tensor], SmallFloats]:
    """One scale for a tensor, for each row, or for each block."""

    def draw(rng: np.random.Generator, kind: Kind, weight: Tensor) -> SmallFloats:
        outputs, inputs = weight.shape
        size = block or ((1, inputs) if rows else (outputs, inputs))
        shape = (-(-outputs // size[0]), -(-inputs // size[1]))
        spread = float(weight.std()) / 100
        scale = torch.from_numpy(rng.uniform(0.5, 1.5, shape).astype(np.float32)) * spread
        values = torch.from_numpy(rng.normal(0, 100, (outputs, inputs)).clip(-448, 448))
        wide = torch.empty(outputs, inputs)
        for row in range(outputs):
            for column in range(0, inputs, size[1]):
                wide[row, column : column + size[1]] = scale[row // size[0], column // size[1]]
        written = scale if block or rows else scale.reshape(())
        return SmallFloats(values.to(torch.float8_e4m3fn), written, wide)

    return draw


def _awq(group: int) -> Kind:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return Kind(config | {"version": "gemm"}, awq, group=group)


def _gptq(
    bits: int, group: int, *, symmetric: bool, act_order: bool = False, v2: bool = False
) -> Kind:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    write = gptq_v2 if v2 else gptq
    return Kind(config, write, bits, group, symmetric, act_order)


def _compressed(
    write: Callable[[Drawn, int], dict[str, Tensor]],
    form: str,
    strategy: str,
    *,
    bits: int = 4,
    group: int = -1,
    symmetric: bool = True,
    act_order: bool = False,
    **more: Any,
) -> Kind:
    weights = {
        "num_bits": bits,
        "type": "float" if form.startswith("float") else "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group if strategy == "group" else None,
        "block_structure": list(more.pop("block")) if "block" in more else None,
        "dynamic": False,
        "actorder": "group" if act_order else None,
    }
    node = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": node},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
    return Kind(config, write, bits, group, symmetric, act_order, torch.bfloat16, **more)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCK = (48, 32)
"""No whole number of them fills a matrix of 64 outputs."""

KINDS: dict[str, Kind] = {
    "awq_32": _awq(32),
    "awq_64": _awq(64),
    "awq_row": _awq(-1),
    "gptq_4_sym": _gptq(4, 32, symmetric=True),
    "gptq_4_asym": _gptq(4, 64, symmetric=False),
    "gptq_4_asym_v2": _gptq(4, 64, symmetric=False, v2=True),
    "gptq_8_sym_row": _gptq(8, -1, symmetric=True),
    "gptq_8_sym": _gptq(8, 32, symmetric=True, v2=True),
    "gptq_8_asym": _gptq(8, 32, symmetric=False),
    "gptq_4_act_order": _gptq(4, 32, symmetric=True, act_order=True),
    "gptq_8_act_order_v2": _gptq(8, 64, symmetric=False, act_order=True, v2=True),
    "awq_16": _awq(16),
    "w4a16": _compressed(packed, "pack-quantized", "group", group=32),
    "w4a16_asym": _compressed(packed_asym, "pack-quantized", "group", group=64, symmetric=False),
    "w4a16_row": _compressed(packed, "pack-quantized", "channel"),
    "w8a16": _compressed(packed, "pack-quantized", "channel", bits=8),
    "w4a16_order": _compressed(packed_order, "pack-quantized", "group", group=32, act_order=True),
    "w8a8": _compressed(int8, "int-quantized", "channel", bits=8),
    "w8a8_asym": _compressed(int8_asym, "int-quantized", "channel", bits=8, symmetric=False),
    "fp8_tensor": Kind(FP8 | {"activation_scheme": "static"}, fp8, 8, draw=small_floats()),
    "fp8_blocks": Kind(
        FP8 | {"fmt": "e4m3", "weight_block_size": list(BLOCK)},
        fp8_inv,
        8,
        draw=small_floats(block=BLOCK),
    ),
    "ct_fp8_rows": _compressed(
        fp8, "float-quantized", "channel", bits=8, draw=small_floats(rows=True)
    ),
    "ct_fp8_tensor": _compressed(fp8, "float-quantized", "tensor", bits=8, draw=small_floats()),
    "ct_fp8_blocks": _compressed(
        fp8, "float-quantized", "block", bits=8, block=BLOCK, draw=small_floats(block=BLOCK)
    ),
}
SMALL_FLOATS = ("fp8_tensor", "fp8_blocks", "ct_fp8_rows", "ct_fp8_tensor", "ct_fp8_blocks")
IN_FLOATS = (
    "awq_16",
    *SMALL_FLOATS,
)
"""Those whose weights have no form that kernels multiply."""


def grid(rng: np.random.Generator, kind: Kind, weight: Tensor) -> Grid:
    """Random integers and zero points with scales that give about the spread of ``weight``."""
    outputs, inputs = weight.shape
    size = inputs if kind.group == -1 else kind.group
    groups, levels = -(-inputs // size), 2**kind.bits
    q = rng.integers(0, levels, (outputs, inputs))
    low, high = (levels // 2, levels // 2 + 1) if kind.symmetric else (0, levels)
    zero = rng.integers(low, high, (outputs, groups))
    spread = float(weight.std()) / levels
    wide = torch.from_numpy(rng.uniform(0.5, 1.5, (outputs, groups)) * 2 * spread)
    scale = wide.to(kind.scale).float().numpy()
    group_of = np.arange(inputs) // size
    if kind.act_order:
        # tools order the inputs of a matrix by what they see there: alike for all that share them
        group_of = np.random.default_rng(inputs).permutation(group_of)
    return Grid(q, scale, zero, group_of)


def is_packed(name: str, tensor: Tensor) -> bool:
    """Linear layers of the decoder's layers, but for routers, as the tools do it."""
    linear = name.startswith("model.layers.") and name.endswith("_proj.weight")
    return tensor.dim() == 2 and (linear or ".experts." in name)


def quantize(
    case: str,
    kind: str | Kind,
    folder: Path,
    change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors,
    **more: Any,
) -> Any:
    """Save a quantised checkpoint of a case of ``checkpoints.CASES`` -> transformers' model in
    fp32 with the weights that it holds. ``change`` is applied to the tensors that are written."""
    kind = KINDS[kind] if isinstance(kind, str) else kind
    model = make(case, folder, **(SIZES | more))
    file, rng = folder / "model.safetensors", np.random.default_rng(3)
    written: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if not is_packed(name, tensor):
            written[name] = tensor
            continue
        made = (kind.draw or grid)(rng, kind, tensor)
        module = name.removesuffix(".weight")
        written |= {f"{module}.{part}": t for part, t in kind.write(made, kind.bits).items()}
        wide[name] = made.weight
    save_file(load_file(file) | wide, file, {"format": "pt"})
    model = type(model).from_pretrained(folder, attn_implementation="eager").float().eval()
    save_file(dict(change(written)), file, {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": kind.config}
    path.write_text(json.dumps(config))
    return model
