"""How a checkpoint's weights are quantised: ``quantization_config`` of its ``config.json``.

No torch here: the API process reads it too.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_di.errors import UnsupportedModelError, nearest

Config = Mapping[str, Any]

SUPPORTED = "awq (4 bits, version gemm), gptq (4 or 8 bits, checkpoint_format gptq or gptq_v2)"
"""For messages."""


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """One scheme, of all quantised weights of a checkpoint."""

    method: str
    """``quant_method``."""
    bits: int
    """Of a weight."""
    group: int
    """Inputs that share a scale; -1: all of a row."""
    zero_offset: int = 0
    """Added to each zero point that is stored: GPTQ's first format stores them less one."""

    def __str__(self) -> str:
        groups = "one scale a row" if self.group == -1 else f"groups of {self.group}"
        return f"{self.method}, {self.bits} bits, {groups}"


def read_scheme(config: Config) -> Scheme | None:
    """The scheme of a ``config.json``; None where its weights are not quantised. Raises
    UnsupportedModelError naming the key that is not understood, and what is supported."""
    node = config.get("quantization_config")
    if node is None or node == {}:
        return None
    if not isinstance(node, Mapping):
        raise _refused("", f"{reprlib.repr(node)} is no object")
    method = node.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        hint = nearest(method, METHODS) if isinstance(method, str) else ""
        raise _refused("quant_method", f"{reprlib.repr(method)} is not supported{hint}")
    return METHODS[method](node)


def _awq(node: Config) -> Scheme:
    _one_of(node, "version", "gemm", "GEMM")
    _one_of(node, "zero_point", True)
    return Scheme(method="awq", bits=_bits(node, 4), group=_group(node))


def _gptq(node: Config) -> Scheme:
    _one_of(node, "is_marlin_format", False)
    _one_of(node, "pack_dtype", "int32")
    form = _one_of(node, "checkpoint_format", "gptq", "gptq_v2") or "gptq"
    rules = node.get("dynamic") or {}
    if not isinstance(rules, Mapping) or any(not str(rule).startswith("-:") for rule in rules):
        raise _refused("dynamic", f"{reprlib.repr(rules)} gives modules bits of their own")
    return Scheme(
        method="gptq",
        bits=_bits(node, 4, 8),
        group=_group(node),
        zero_offset=1 if form == "gptq" else 0,
    )


METHODS: dict[str, Callable[[Config], Scheme]] = {"awq": _awq, "gptq": _gptq}


def _bits(node: Config, *supported: int) -> int:
    key = "bits" if "bits" in node else "w_bit"
    if key not in node:
        raise _refused("bits", "is missing")
    return int(_one_of(node, key, *supported) or supported[0])


def _group(node: Config) -> int:
    key = "group_size" if "group_size" in node else "q_group_size"
    group = node.get(key)
    if isinstance(group, bool) or not isinstance(group, int) or not (group == -1 or group > 0):
        raise _refused("group_size", f"{reprlib.repr(group)}: expected -1 or a count of inputs")
    return group


def _one_of(node: Config, key: str, *supported: Any) -> Any:
    """The value of a key, or None where it has none. Raises UnsupportedModelError for another."""
    value = node.get(key)
    if value is not None and not any(value == s and type(value) is type(s) for s in supported):
        expected = " or ".join(map(str, supported))
        raise _refused(key, f"{reprlib.repr(value)} is not supported, {expected} is")
    return value


def _refused(key: str, why: str) -> UnsupportedModelError:
    name = f"quantization_config.{key}" if key else "quantization_config"
    return UnsupportedModelError(
        f"the checkpoint's weights are quantized, and {name} of its config.json {why}; supported "
        f"are {SUPPORTED}; else take the unquantized checkpoint or a GGUF file"
    )
