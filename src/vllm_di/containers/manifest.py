"""The manifest of a platform: the ``platform:`` node of ``conf/platform/NAME.yaml``, checked.

It says who keeps the port, which version of the interfaces it was written for, how the platform is
detected and what it can do. Conformance tests what it declares; nothing else in the engine asks.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from vllm_di.components.interfaces import INTERFACE_VERSION, OpTable
from vllm_di.errors import ConfigError, PortError, nearest

Level = Literal[
    "declared", "contract-tested", "compile-checked", "runtime-tested", "hardware-tested"
]
LEVELS: tuple[Level, ...] = typing.get_args(Level)
"""From the least to the most proven."""
_VERSION = re.compile(r"\d+\.\d+")

DType = Literal[
    "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int4"
]


class Detect(msgspec.Struct, frozen=True, kw_only=True):
    """Conditions of ``platform=auto``; all must hold. None given: never chosen."""

    modules: tuple[str, ...] = ()
    """Python packages that must be installed. They are not imported."""
    files: tuple[str, ...] = ()
    """Globs that must match, such as ``/dev/davinci*``."""


class CompileTargets(msgspec.Struct, frozen=True, kw_only=True):
    """What ``vllm-di conform --level compile`` compiles, without the device."""

    by: str
    """Dotted name of a ``components.compile_check.CompileCheck``."""
    targets: tuple[str, ...]
    """Which of its targets: those that the platform claims to run on."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What the platform can do. A capability that is not declared is not tested and not shown."""

    dtypes: tuple[DType, ...] = ("float32",)
    """Of weights and activations; the conformance suite runs each."""
    kv_dtypes: tuple[DType, ...] = ()
    """Of the KV cache; none given: the same as ``dtypes``."""
    head_sizes: tuple[int, ...] | None = None
    """Of attention; null: any."""
    block_sizes: tuple[int, ...] | None = None
    """Tokens in a block of the KV cache; null: any."""
    graphs: bool = False
    """Whether steps can be captured and replayed."""
    tensor_parallel: tuple[int, ...] = (1,)
    """World sizes."""
    quantization: tuple[str, ...] = ()
    """Options of the group ``quantization`` beside ``none``."""
    sliding_window: bool = False
    soft_cap: bool = False
    batch_invariant: bool = False
    """Whether a request's tokens and log-probs are bit-equal whatever shares its batch."""
    clears_block_tail: bool = False
    """Whether attention may set to zero what the last block of a sequence does not hold yet."""
    static_shapes: bool = False
    """Whether every shape that a step can have is compiled at the start: the requests of a step
    that has to compile end with an error."""
    ops: tuple[str, ...] = ()
    """Ops that its own library implements; the others run on the torch reference."""


class RayNeeds(msgspec.Struct, frozen=True, kw_only=True):
    """How ``executor=ray`` places the platform's workers."""

    resource: str | None = None
    """By which name a Ray cluster knows the device: ``CPU``, ``GPU``, ``NPU``, or one that nodes
    are started with (``ray start --resources``)."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A platform's own description."""

    name: str
    """The option's name."""
    level: Level
    """The support level that its recorded conformance reports give it (docs/support-matrix.md).
    What it says beyond them is a claim, and is shown as one."""
    interface: str | None = None
    """Version of the interfaces that it was written for; required of a port out of tree."""
    maintainer: str | None = None
    """The maintainer: a name and an address."""
    requires: tuple[str, ...] = ()
    """Python packages beside torch that it runs on, as they are imported. Reports record their
    versions; the suite takes them away to see what the port says."""
    detect: Detect = Detect()
    capabilities: Capabilities = Capabilities()
    besides: tuple[str, ...] = ()
    """Evidence beside the suite, a line each with the command or test that produced it. The support
    matrix has it in a column of its own; it does not raise the level."""
    ray: RayNeeds = RayNeeds()
    compile: CompileTargets | None = None
    """null: nothing is compiled ahead, and the platform is never compile-checked."""

    @property
    def packages(self) -> list[str]:
        """Top-level packages that it requires or detects, each once."""
        names = (m.split(".")[0] for m in (*self.requires, *self.detect.modules))
        return list(dict.fromkeys(names))

    def announcement(self, claimed: Level | None = None) -> str:
        """The line about the platform that a start prints. ``claimed`` is a level that no report
        proves."""
        caution = "" if self.level == LEVELS[-1] else f" (not {LEVELS[-1]})"
        if claimed:
            caution = f" ({claimed} is claimed; no recorded report shows it)"
        old = self.interface not in (None, INTERFACE_VERSION)
        ending = (
            f"; written for interfaces {self.interface}, which the minor after {INTERFACE_VERSION} "
            "will not serve"
            if old
            else ""
        )
        return f"platform {self.name}: {self.level}{caution}{ending}"


def read_manifest(
    node: Any, option: str, place: Callable[[str], str], *, out_of_tree: bool = False
) -> Manifest:
    """The manifest of the platform ``option``. ``place`` gives the file and line of a dotted key.

    Raises ConfigError for an unknown key or a wrong value, PortError for a version of the
    interfaces that this engine does not serve.
    """
    if isinstance(node, dict):
        _check_version(node.get("interface"), option, place)
    found: Manifest = _convert(node, Manifest, "platform", place)
    if found.name != option:
        raise PortError(
            f"{place('platform.name')}: platform.name is {found.name!r}, but the file makes it the "
            f"option {option!r}; give both one name"
        )
    for op in found.capabilities.ops:
        if op not in OpTable.OPS:
            raise ConfigError(
                f"{place('platform.capabilities.ops')}: platform.capabilities.ops: no op {op!r}; "
                f"there are {', '.join(OpTable.OPS)}{nearest(op, OpTable.OPS)}"
            )
    if found.interface is None and out_of_tree:
        raise PortError(
            f"{place('platform')}: platform.interface: a port out of tree must say which version "
            f"of the interfaces it was written for; this engine has {INTERFACE_VERSION}"
        )
    if found.interface is not None and not is_served(found.interface):
        served = " and ".join(served_versions())
        raise PortError(
            f"{place('platform.interface')}: platform.interface: {option} was written for "
            f"interfaces {found.interface}, this engine has {INTERFACE_VERSION} and serves {served}"
        )
    return found


def _check_version(value: object, option: str, place: Callable[[str], str]) -> None:
    """Raise PortError for what is no version: a number without quotes, a word."""
    if value is None or (isinstance(value, str) and _VERSION.fullmatch(value)):
        return
    served = " and ".join(served_versions())
    form = (
        f'"{value}" in quotes' if isinstance(value, float) else f'MAJOR.MINOR, such as "{served}"'
    )
    raise PortError(
        f"{place('platform.interface')}: platform.interface: {value!r} is no version: write "
        f"{form}; {option} says which interfaces it was written for, and this engine has "
        f"{INTERFACE_VERSION} and serves {served}"
    )


def read_detect(node: Any, place: Callable[[str], str]) -> Detect:
    """The conditions alone, for ``platform=auto``. Raises ConfigError."""
    found: Detect = _convert(node, Detect, "platform.detect", place)
    return found


def served_versions(engine: str = INTERFACE_VERSION) -> list[str]:
    """The versions of the interfaces whose ports this engine takes: its own, and the minor
    before."""
    major, minor = map(int, engine.split("."))
    return [f"{major}.{n}" for n in (minor - 1, minor) if n >= 0]


def is_served(version: str, engine: str = INTERFACE_VERSION) -> bool:
    """Whether a port written for ``version`` runs on an engine with the interfaces ``engine``."""
    return bool(_VERSION.fullmatch(version)) and version in served_versions(engine)


def _convert(value: Any, kind: Any, path: str, place: Callable[[str], str]) -> Any:
    """``value`` as ``kind``, one field at a time, so that an error has the place of its key."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if not isinstance(value, dict):
            raise ConfigError(f"{place(path)}: {path}: expected a mapping, got {value!r}")
        hints, fields = typing.get_type_hints(kind), msgspec.structs.fields(kind)
        for key in value:
            if key not in hints:
                raise ConfigError(
                    f"{place(f'{path}.{key}')}: {path}.{key}: no such key; {path} has "
                    f"{', '.join(hints)}{nearest(str(key), hints)}"
                )
        for field in fields:
            if field.required and field.name not in value:
                raise ConfigError(f"{place(path)}: {path}.{field.name}: this key is needed")
        parts = {k: _convert(v, hints[k], f"{path}.{k}", place) for k, v in value.items()}
        return kind(**parts)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        options = literals(kind)
        listed = value if isinstance(value, list) else [value]
        wrong = next((v for v in listed if v not in options), None) if options else None
        choose = f"; choose of {', '.join(options)}{nearest(str(wrong), options)}" if wrong else ""
        raise ConfigError(
            f"{place(path)}: {path}: {str(error).partition(' - at')[0]} (the value is {value!r})"
            f"{choose}"
        ) from None


def literals(kind: Any) -> list[str]:
    """The values of a ``Literal``, at whatever depth of the type."""
    if typing.get_origin(kind) is Literal:
        return [str(text) for text in typing.get_args(kind)]
    return [option for part in typing.get_args(kind) for option in literals(part)]
