"""Values that a key must refuse, derived from its annotation alone: the engine's own converter is
not asked."""

from __future__ import annotations

import inspect
import math
import types
import typing
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

CANDIDATES: tuple[Any, ...] = (
    "no such thing",
    -7,
    2**62,
    1.5,
    True,
    None,
    ["x"],
    [1.5],
    {"no_such_key": 1},
)


class Bad(typing.NamedTuple):
    """One value that must be refused, or ``...`` for a key that is left out."""

    key: str
    value: Any


def hints(cls: type) -> dict[str, Any]:
    """Key to annotation of a constructor. The fields of a ``config`` struct count as keys."""
    found = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    known = {}
    for name, one in inspect.signature(cls).parameters.items():
        given = one.annotation is not one.empty and not isinstance(one.annotation, str)
        known[name] = one.annotation if given else found.get(name, Any)
    config = known.get("config")
    if isinstance(config, type) and issubclass(config, msgspec.Struct):
        del known["config"]
        known |= typing.get_type_hints(config, include_extras=True)
    return known


def bad_values(cls: type, node: Mapping[str, Any]) -> Iterator[Bad]:
    """Wrong types, values out of range, unknown keys, keys left out."""
    known = hints(cls)
    for key, value in node.items():
        if key == "_target_" or (isinstance(value, dict) and "_target_" in value):
            continue
        yield Bad(key + "x", value)
        for candidate in CANDIDATES:
            if not accepts(known[key], candidate):
                yield Bad(key, candidate)
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in node and parameter.default is parameter.empty:
            yield Bad(name, ...)


def unchecked(cls: type, node: Mapping[str, Any]) -> list[str]:
    """Keys that take anything."""
    known = hints(cls)
    return [key for key in node if key != "_target_" and known.get(key, Any) in (Any, object)]


def accepts(hint: Any, value: Any) -> bool:
    """Whether plain data may be given for ``hint``; True where that is hard to decide."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return accepts(args[0], value) and _within(args[1:], value)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(part, value) for part in args)
    if origin is Literal:
        return value in args and type(value) in {type(a) for a in args}
    if hint is None or hint is type(None):
        return value is None
    if hint is bool or hint is str:
        return type(value) is hint
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) in (int, float)
    if origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, list):
            return False
        return all(accepts(args[0], v) for v in value) if args else True
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    # no plain value is a component
    return not isinstance(hint, ABCMeta)


def _within(limits: tuple[Any, ...], value: Any) -> bool:
    """A number between the bounds of msgspec's ``Meta``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    for meta in limits:
        low, high = getattr(meta, "ge", None), getattr(meta, "le", None)
        above, below = getattr(meta, "gt", None), getattr(meta, "lt", None)
        if math.isnan(value):
            return False
        if (low is not None and value < low) or (high is not None and value > high):
            return False
        if (above is not None and value <= above) or (below is not None and value >= below):
            return False
    return True
