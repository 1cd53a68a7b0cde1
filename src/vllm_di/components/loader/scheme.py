"""How a checkpoint's weights are quantised: ``quantization_config`` of its ``config.json``.

No torch here: the API process reads it too.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import msgspec

from vllm_di.errors import UnsupportedModelError, nearest

Config = Mapping[str, Any]

SUPPORTED = (
    "awq (4 bits, version gemm), gptq (4 or 8 bits, checkpoint_format gptq or gptq_v2), fp8 (e4m3, "
    "by tensor or in blocks), compressed-tensors (int-quantized, pack-quantized and "
    "float-quantized, 4 or 8 bits)"
)
"""For messages."""


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """One scheme, of all quantised weights of a checkpoint."""

    method: str
    """``quant_method``."""
    format: str
    """How the tensors are written: a key of ``formats.FORMATS``."""
    bits: int
    """Of a weight."""
    group: int = -1
    """Inputs that share a scale; -1: all of a row."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale, in place of ``group``."""
    is_float: bool = False
    """Whether weights are small floats, not integers in even steps."""
    symmetric: bool = False
    """Whether there are no zero points beside the scales."""
    zero_offset: int = 0
    """Added to each zero point that is stored: GPTQ's first format stores them less one."""

    def __str__(self) -> str:
        kind = "a float of 8 bits" if self.is_float else f"{self.bits} bits"
        groups = "one scale a row" if self.group == -1 else f"groups of {self.group}"
        if self.block is not None:
            groups = f"blocks of {self.block[0]} x {self.block[1]}"
        elif self.is_float:
            groups = "one scale a row or tensor"
        return f"{self.method}, {kind}, {groups}"


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
    return Scheme(method="awq", format="awq", bits=_bits(node, 4), group=_group(node))


def _gptq(node: Config) -> Scheme:
    _one_of(node, "is_marlin_format", False)
    _one_of(node, "pack_dtype", "int32")
    form = _one_of(node, "checkpoint_format", "gptq", "gptq_v2") or "gptq"
    rules = node.get("dynamic") or {}
    if not isinstance(rules, Mapping) or any(not str(rule).startswith("-:") for rule in rules):
        raise _refused("dynamic", f"{reprlib.repr(rules)} gives modules bits of their own")
    return Scheme(
        method="gptq",
        format="gptq",
        bits=_bits(node, 4, 8),
        group=_group(node),
        zero_offset=1 if form == "gptq" else 0,
    )


def _fp8(node: Config) -> Scheme:
    _one_of(node, "fmt", "e4m3", "float8_e4m3fn")
    _one_of(node, "activation_scheme", "dynamic", "static")
    block = _block(node, "weight_block_size")
    form = "fp8" if block is None else "fp8_blocks"
    return Scheme(method="fp8", format=form, bits=8, block=block, is_float=True, symmetric=True)


FORMS = {
    "int-quantized": "int8",
    "naive-quantized": "int8",
    "float-quantized": "fp8",
    "pack-quantized": "packed",
}
"""compressed-tensors' formats."""


def _compressed(node: Config) -> Scheme:
    sparse = node.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise _refused("sparsity_config", f"{reprlib.repr(sparse)} is not supported")
    if node.get("transform_config"):
        raise _refused("transform_config", "is not supported: it rotates what weights multiply")
    groups = node.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("config_groups", f"{reprlib.repr(groups)}: expected groups of weights")
    found = [_compressed_group(node, name, group) for name, group in groups.items()]
    if any(scheme != found[0] for scheme in found):
        raise _refused("config_groups", "has groups of several schemes, and one is supported")
    return found[0]


def _compressed_group(node: Config, name: str, group: Any) -> Scheme:
    place = f"config_groups.{name}.weights"
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _refused(place, f"{reprlib.repr(weights)}: expected what its weights are")
    form = group.get("format") or node.get("format")
    if form not in FORMS:
        raise _refused("format", f"{reprlib.repr(form)} is not supported, {', '.join(FORMS)} are")
    is_float = _one_of(weights, "type", "int", "float", place=place) == "float"
    bits = _bits(weights, *((8,) if is_float else (4, 8)), key="num_bits", place=place)
    if is_float != (FORMS[form] == "fp8") and form != "naive-quantized":
        raise _refused(f"{place}.type", f"does not go with the format {form}")
    strategies = ("tensor", "channel", "block") if is_float else ("tensor", "channel", "group")
    by_size = "group" if weights.get("group_size") else "tensor"
    strategy = _one_of(weights, "strategy", *strategies, place=place) or by_size
    _one_of(weights, "dynamic", False, place=place)
    symmetric = _one_of(weights, "symmetric", True, *(() if is_float else (False,)), place=place)
    return Scheme(
        method="compressed-tensors",
        format="fp8" if is_float else FORMS[form],
        bits=bits,
        group=_group(weights, place=place) if strategy == "group" else -1,
        block=_block(weights, "block_structure", place) if strategy == "block" else None,
        is_float=is_float,
        symmetric=symmetric is not False,
    )


METHODS: dict[str, Callable[[Config], Scheme]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}


def _bits(node: Config, *supported: int, key: str = "bits", place: str = "") -> int:
    if key not in node and "w_bit" in node:
        key = "w_bit"
    if node.get(key) is None:
        raise _refused(_key(place, key), "is missing")
    return int(_one_of(node, key, *supported, place=place))


def _group(node: Config, place: str = "") -> int:
    key = "group_size" if "group_size" in node else "q_group_size"
    group = node.get(key)
    if _is_count(group) or (isinstance(group, int) and group == -1):
        return group
    raise _refused(
        _key(place, "group_size"), f"{reprlib.repr(group)}: expected -1 or a count of inputs"
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _block(node: Config, key: str, place: str = "") -> tuple[int, int] | None:
    block = node.get(key)
    if block is None and not place:
        return None
    sizes = block if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(_is_count(size) for size in sizes):
        raise _refused(
            _key(place, key), f"{reprlib.repr(block)}: expected two counts, of outputs and inputs"
        )
    return sizes[0], sizes[1]


def _one_of(node: Config, key: str, *supported: Any, place: str = "") -> Any:
    """The value of a key, or None where it has none. Raises UnsupportedModelError for another."""
    value = node.get(key)
    if value is not None and not any(
        value == s and isinstance(value, bool) == isinstance(s, bool) for s in supported
    ):  # 1 is not true
        expected = " or ".join(map(str, supported))
        raise _refused(_key(place, key), f"{reprlib.repr(value)} is not supported, {expected} is")
    return value


def _key(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _refused(key: str, why: str) -> UnsupportedModelError:
    name = f"quantization_config.{key}" if key else "quantization_config"
    return UnsupportedModelError(
        f"the checkpoint's weights are quantized, and {name} of its config.json {why}; supported "
        f"are {SUPPORTED}; else take the unquantized checkpoint or a GGUF file"
    )
