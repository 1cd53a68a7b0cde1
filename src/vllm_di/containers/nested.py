"""Options that are named inside a node, and options that take another's place after composing.

Both are composed by Hydra, as the option of a slot is: a ``defaults`` list holds everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vllm_di.components.interfaces import OpTable
from vllm_di.containers.compose import Composition, ConfigTree
from vllm_di.containers.keys import HALVES, OPTION
from vllm_di.containers.origins import Origin, place_of
from vllm_di.containers.tree import shown
from vllm_di.errors import ConfigError, nearest

DEEPEST = 8


class Named(NamedTuple):
    """A place in the config where an option is named."""

    key: str
    group: str
    option: str
    keys: dict[str, Any]
    """Keys that are set beside ``_option_``."""


def resolve_nested(tree: ConfigTree, composition: Composition) -> None:
    """Replace names by nodes: ``ops.rms_norm=torch``, ``attention.prefill=sdpa``, ``_option_``.
    Raises ConfigError with the place of an unknown name."""
    for _ in range(DEEPEST):
        plain: Any = OmegaConf.to_container(composition.values, resolve=False)
        names = [named for slot, node in plain.items() for named in _named(node, slot, slot)]
        if not names:
            return
        for named in names:
            _put(tree, composition, named)
    raise ConfigError(
        f"{place_of(composition.origins, names[0].key)}: {names[0].key}: {names[0].group}="
        f"{names[0].option} names itself: options are nested more than {DEEPEST} deep"
    )


def _named(node: Any, key: str, slot: str) -> Iterator[Named]:
    """The names within a slot's node, which is plain data."""
    for name, inner in node.items() if isinstance(node, dict) else ():
        where = f"{key}.{name}"
        if isinstance(inner, dict) and OPTION in inner:
            group, _, option = str(inner[OPTION]).partition("/")
            yield Named(where, group, option, {k: v for k, v in inner.items() if k != OPTION})
        elif isinstance(inner, dict):
            yield from _named(inner, where, slot)
        elif isinstance(inner, str) and inner != "auto":
            if slot == "ops" and key == slot and name in OpTable.OPS:
                yield Named(where, "ops", inner, {})
            elif slot == "attention" and name in HALVES:
                yield Named(where, "attention", inner, {})


def _put(tree: ConfigTree, composition: Composition, named: Named) -> None:
    place = place_of(composition.origins, named.key)
    options = tree.options(named.group)
    if named.option not in options:
        auto = "auto, " if named.group == "ops" else ""
        what = f"no option {named.option!r}; choose {auto}{', '.join(options)}"
        if not options:
            what = f"no group {named.group!r}{nearest(named.group, tree.groups())}"
        raise ConfigError(f"{place}: {named.key}: {what}{nearest(named.option, options)}")
    try:
        node, origins = tree.compose_option(named.group, named.option)
    except ConfigError as error:
        raise type(error)(f"{place}: {named.key}: {error}") from None
    if named.group == "ops":
        library = node.get("library")
        if library is None:
            raise ConfigError(
                f"{shown(options[named.option])}: has no `library` node, so {named.key} cannot "
                "use it"
            )
        node, start = library, "library."
        origins = {k.removeprefix(start): o for k, o in origins.items() if k.startswith(start)}
    for key, value in named.keys.items():
        OmegaConf.update(node, key, value, force_add=True)
    OmegaConf.update(composition.values, named.key, node, force_add=True, merge=False)
    for key, origin in origins.items():
        composition.origins.setdefault(f"{named.key}.{key}", origin)


def replace_option(
    tree: ConfigTree, composition: Composition, slot: str, option: str, why: str
) -> None:
    """Put another option's node into a slot whose choice was ``auto``. Keys that the command line
    set stay as it set them."""
    values, origins = composition.values, composition.origins
    own = {k: o for k, o in origins.items() if k.startswith(f"{slot}.")}
    kept = {key: OmegaConf.select(values, key) for key, origin in own.items() if origin.by_user}
    values[slot], found = tree.compose_option(slot, option)
    for key, value in kept.items():
        OmegaConf.update(values, key, value, force_add=True)
    composition.choices[slot] = (option, Origin("auto", text=why))
    for key in own.keys() - kept.keys():
        del origins[key]
    for key, origin in found.items():
        origins.setdefault(f"{slot}.{key}", Origin("auto", origin.file, origin.line))
