"""Tables of rotary position embedding, with the scalings that long-context models use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_di.errors import UnsupportedModelError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def cos_sin_table(
    *,
    rotary_dim: int,
    num_positions: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    max_position_embeddings: int,
) -> Tensor:
    """[num_positions, rotary_dim] fp32: the cosines of each position, then its sines.

    ``scaling`` has the keys of Hugging Face configs. Raises UnsupportedModelError for an unknown
    kind.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    amplitude = 1.0
    if kind in ("default", "dynamic"):
        # dynamic scaling acts beyond max_position_embeddings, which is never served
        frequencies = plain
    elif kind == "linear":
        frequencies = plain / float(scaling["factor"])
    elif kind == "llama3":
        frequencies = _llama3(plain, scaling, max_position_embeddings)
    elif kind == "yarn":
        frequencies, amplitude = _yarn(plain, rotary_dim, theta, scaling, max_position_embeddings)
    elif kind in ("longrope", "su"):
        frequencies, amplitude = _longrope(plain, num_positions, scaling, max_position_embeddings)
    else:
        raise UnsupportedModelError(
            f"rope_scaling {kind!r} is unknown; known are {', '.join(KINDS)}"
        )
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), -1) * amplitude


def _llama3(plain: Tensor, scaling: Mapping[str, Any], max_positions: int) -> Tensor:
    """Llama 3.1: long wavelengths are divided by ``factor``, short ones kept, a ramp between."""
    factor = float(scaling["factor"])
    old = float(scaling.get("original_max_position_embeddings") or max_positions)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = old * plain / (2 * math.pi)  # rotations over the original context
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (ramp + (1 - ramp) / factor)


def _yarn(
    plain: Tensor, dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), sections 3.2 and 3.4."""
    old = float(scaling.get("original_max_position_embeddings") or max_positions)
    factor = float(scaling.get("factor") or max_positions / old)

    def attention(scale: float, strength: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * strength * math.log(scale) + 1.0

    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if above and below:
            amplitude = attention(factor, float(above)) / attention(factor, float(below))
        else:
            amplitude = attention(factor)

    def dimension(rotations: float) -> float:
        """The dimension that turns ``rotations`` times over the original context."""
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp, float(amplitude)


def _longrope(
    plain: Tensor, num_positions: int, scaling: Mapping[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """LongRoPE as Phi-3 has it: one list of divisors for short contexts, one for long.

    A cache cannot change lists when a sequence grows long, so the context that is served decides.
    """
    old = int(scaling.get("original_max_position_embeddings") or max_positions)
    divisors = scaling["long_factor"] if num_positions > old else scaling["short_factor"]
    factor = float(scaling.get("factor") or max_positions / old)
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    return plain / torch.tensor(divisors, dtype=torch.float32), float(amplitude)
