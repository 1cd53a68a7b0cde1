"""Why a dotted key of an override is none of a composed config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vllm_di.components.interfaces import OpTable
from vllm_di.errors import nearest

OPTION = "_option_"
"""In any node within a slot's, ``inner: {_option_: attention/sdpa, KEY: VALUE}`` stands for that
option's node with some of its keys set."""
HALVES = ("prefill", "decode")
"""Keys of an attention that may name an option of it."""


def unknown_key(values: DictConfig, key: str, value: str, names: Iterable[str] = ()) -> str | None:
    """What is wrong with ``key=value``; None where the key is there. ``names``: the keys of a value
    that is a mapping."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        parent, name = ".".join(parts[:depth]), parts[depth]
        node: Any = OmegaConf.select(values, parent, throw_on_resolution_failure=False)
        if not isinstance(node, DictConfig):
            return _no_node(parent, node, ".".join(parts[depth:]), value)
        if parent == "ops" and name in OpTable.OPS and name not in node and depth + 1 < len(parts):
            return _no_node(f"ops.{name}", "auto", ".".join(parts[depth + 1 :]), value)
        if name not in node:
            return _not_in(parent, node, name)
    node = OmegaConf.select(values, key, throw_on_resolution_failure=False)
    if isinstance(node, DictConfig):
        for name in names:
            if name not in node:
                return _not_in(key, node, name)
    return None


def _not_in(parent: str, node: DictConfig, name: str) -> str:
    keys = [str(k) for k in node if k != "_target_"]
    keys += OpTable.OPS if parent == "ops" else ()
    has = f"it has {', '.join(keys)}" if keys else "it takes no keys"
    return f"{parent} has no key {name!r}; {has}{nearest(name, keys)}"


def _no_node(parent: str, found: object, rest: str, value: str) -> str:
    """For a key below one that holds a plain value."""
    slot, _, name = parent.partition(".")
    if isinstance(found, str) and (slot == "ops" or (slot == "attention" and name in HALVES)):
        option = "OPTION" if found == "auto" else found
        node = f"{OPTION}: {slot}/{option}, {_nested(rest, value)}"
        return (
            f"{parent} names an option, {found!r}; to set a key of one, write '{parent}={{{node}}}'"
        )
    shown = "null" if found is None else repr(found)
    whole = f"{parent}={{{_nested(rest, value)}}}"
    return f"{parent} is {shown}, which has no keys; give it whole: '{whole}'"


def _nested(rest: str, value: str) -> str:
    first, _, more = rest.partition(".")
    return f"{first}: {{{_nested(more, value)}}}" if more else f"{first}: {value}"
