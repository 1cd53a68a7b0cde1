"""Overrides to choices: what each slot of vLLM is to hold, as plain data, with its place.

There are two trees of config groups. This folder's ``conf/`` has the slots of vLLM, with options of
vLLM's own and classes that a user names. Its option ``ours`` of a slot stands for any option that
the project's ``conf/`` (and a port's) has for the slot of that name: ``attention=sdpa``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from omegaconf import OmegaConf

from vllm_di.components.interfaces import OpTable
from vllm_di.containers.assembly import Assembly, Choice
from vllm_di.containers.compose import ConfigTree
from vllm_di.containers.detect import detect_platform
from vllm_di.containers.origins import Origin, place_of
from vllm_di.containers.overrides import Words, read
from vllm_di.containers.schema import check_trusted
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import ConfigError, nearest
from vllm_di.parts import assemble_parts
from vllm_di.vllm.container import ADAPTED, CALLED_BY, LAYERS, SHUT, SLOTS
from vllm_di.vllm.sources import Override

CONF = Path(__file__).parent / "conf"
OURS, STOCK = "ours", "stock"


class Choices(msgspec.Struct):
    """What was chosen for each slot of vLLM."""

    overrides: list[Override]
    nodes: dict[str, Any]
    """Slot to its node."""
    options: dict[str, Choice]
    """Slot to its option and who chose it."""
    origins: dict[str, Origin]
    packages: list[str]
    """Packages whose classes a node may name."""
    parts: Assembly
    """This project's components, for the slots that hold ``ours``."""

    def place(self, key: str) -> str:
        """Where the value of a dotted key came from."""
        return place_of(self.origins, key)

    def where(self, slot: str) -> str:
        """Who chose a slot's content, for messages."""
        if slot in ("ops", "ir_op_priority"):
            origins = (o for k, o in self.origins.items() if k.startswith(f"{slot}."))
            typed = dict.fromkeys(str(o) for o in origins if o.by_user)
            return ", ".join(typed) or str(self.options[slot].origin)
        own = self.origins.get(f"{slot}._target_")
        return str(own if own and own.by_user else self.options[slot].origin)

    def is_ours(self, slot: str) -> bool:
        """Whether an adapter with a component of this project fills it."""
        if slot == "ops":
            return OURS in self.layers.values()
        return self.options[slot].option == OURS

    def is_stock(self, slot: str) -> bool:
        """Whether it is left to vLLM."""
        if slot == "ops":
            return not self.layers
        if slot == "ir_op_priority":
            return not any(self.nodes[slot].values())
        return slot == "platform" or self.nodes[slot]["_target_"] is None

    @property
    def layers(self) -> dict[str, str]:
        """vLLM's layer to ``ours`` or a class, for those that somebody chose."""
        return {n: str(v) for n, v in self.nodes["ops"]["layers"].items() if v != STOCK}

    @property
    def chosen(self) -> list[str]:
        """Slots that are not left to vLLM."""
        return [slot for slot in SLOTS if not self.is_stock(slot)]


def choose(overrides: Sequence[Override], config_dirs: Iterable[str | Path] = ()) -> Choices:
    """Understand overrides, without vLLM and without importing a component. Raises ConfigError with
    the place of what is wrong and the nearest name that is right."""
    folders = list(config_dirs)
    sorting = _Sorting(ConfigTree([CONF]), ConfigTree.find(folders))
    for text, where in overrides:
        sorting.add_option(text, where)
    for text, where in overrides:
        sorting.add_key(text, where)
    tree, sources = sorting.theirs, sorting.sources
    if not any(read(text).key == "platform" for text in sorting.for_vllm):
        option, reason = detect(sorting.ours)
        text = f"platform={option}"
        if option not in tree.options("platform"):
            raise ConfigError(f"platform={option}: {reason}, which is no platform of vLLM's own")
        sorting.for_vllm.append(text)
        sources[text] = Origin("auto", text=reason)
    composition = tree.compose(sorting.for_vllm, sources)
    nodes: Any = OmegaConf.to_container(composition.values, resolve=True)
    trusted = nodes.pop("trust")
    if not isinstance(trusted, list) or not all(isinstance(name, str) for name in trusted):
        raise ConfigError(
            f"{place_of(composition.origins, 'trust')}: trust: expected a list of "
            f"top-level package names, got {trusted!r}"
        )
    parts = assemble_parts(sorting.for_parts, platform=nodes["platform"]["parts"])
    choices = Choices(
        overrides=list(overrides),
        nodes=nodes,
        options={slot: Choice(*composition.choices[slot]) for slot in SLOTS},
        origins=dict(composition.origins),
        packages=["vllm", "vllm_di", *trusted],
        parts=parts,
    )
    _check_keys(choices)
    _check_packages(choices)
    sorting.check_called(choices)
    return choices


def detect(tree: ConfigFiles) -> tuple[str, str]:
    """-> (platform, reason): what vLLM's distribution was built for, else what is found here."""
    from vllm_di.vllm.versions import build

    if (found := build()) is not None:
        return found
    return detect_platform(tree)


def _check_packages(choices: Choices) -> None:
    """Classes come from vLLM, this project or a trusted package. None is imported."""
    targets = {f"{s}._target_": choices.nodes[s].get("_target_") for s in SLOTS}
    targets |= {f"ops.layers.{n}": v for n, v in choices.layers.items() if v != OURS}
    for key, target in targets.items():
        if isinstance(target, str):
            slot = key.removesuffix("._target_")
            check_trusted(target, choices.packages, choices.place(key), slot)


def _check_keys(choices: Choices) -> None:
    """vLLM builds a class with arguments of its own: a node holds no other key."""
    for slot in SLOTS:
        node = choices.nodes[slot]
        if slot in ("ops", "ir_op_priority", "platform"):
            continue
        for key in node:
            if key != "_target_":
                place = choices.place(f"{slot}.{key}")
                raise ConfigError(
                    f"{place}: {slot}.{key}: vLLM builds the class itself, with arguments of its "
                    "own: there is no key but _target_"
                )


class _Sorting:
    """Which override goes to which tree."""

    def __init__(self, theirs: ConfigTree, ours: ConfigTree) -> None:
        self.theirs, self.ours = theirs, ours
        self.sources: dict[str, Origin] = {}
        self.for_vllm: list[str] = []
        self.for_parts: list[Override] = []
        self._slots_of_ours: set[str] = set()
        self._ops: list[tuple[str, str, str]] = []
        """(op, override, where): ops that somebody chose one by one."""

    def add_option(self, text: str, where: str) -> None:
        """An override that chooses a slot's option."""
        words, place = read(text), f"{where}: {text!r}"
        self._check_slot(words, place)
        if words.key != words.slot or words.slot == "trust" or words.sign:
            return
        slot, value = words.slot, words.value
        theirs = [o for o in self.theirs.options(slot) if o != OURS]
        ours = list(self.ours.options(slot)) if slot in (*ADAPTED, "ops") else []
        if value in theirs:
            self._give(text, text, where)
        elif value in ours:
            self._slots_of_ours.add(slot)
            self.for_parts.append((text, where))
            if slot == "ops":
                for layer in LAYERS:
                    self._give(f"ops.layers.{layer}={OURS}", text, where)
            else:
                self._give(f"{slot}={OURS}", text, where)
        else:
            there = [*ours, *theirs]
            own = value in self.ours.options(slot)
            why = (
                f"{value!r} is a component of vllm-di that has no adapter: vLLM's {slot} has "
                f"another interface; name a class for it with {slot}._target_=PACKAGE.CLASS"
                if own
                else f"group {slot!r} has no option {value!r} in vLLM; it has {', '.join(there)}"
                f"{nearest(value, there)}"
            )
            raise ConfigError(f"{place}: {why}")

    def add_key(self, text: str, where: str) -> None:
        """An override of a key within a slot's node."""
        words = read(text)
        slot, rest = words.slot, words.key.partition(".")[2]
        if words.key == slot and slot != "trust" and not words.sign:
            return
        if slot == "trust":
            self._give(text, text, where)
            self.for_parts.append((text, where))
        elif slot == "ops" and not rest.startswith("layers"):
            self._add_op(rest, text, where)
        elif slot in self._slots_of_ours:
            self.for_parts.append((text, where))
        else:
            self._give(text, text, where)

    def _add_op(self, rest: str, text: str, where: str) -> None:
        op = rest.split(".")[0]
        layer = next((name for name, ops in LAYERS.items() if op in ops), None)
        known = [*(o for ops in LAYERS.values() for o in ops), *CALLED_BY]
        if layer is None and op in OpTable.OPS and op not in CALLED_BY:
            raise ConfigError(
                f"{where}: {text!r}: no part of vLLM calls the op {op!r}; those that an adapter "
                f"calls are {', '.join(known)}"
            )
        if layer is None and op not in CALLED_BY and "ops" not in self._slots_of_ours:
            raise ConfigError(
                f"{where}: {text!r}: ops has no key {op!r} in vLLM; it has "
                f"layers, {', '.join(known)}{nearest(op, ['layers', *known])}"
            )
        self.for_parts.append((text, where))
        if layer is not None:
            self._give(f"ops.layers.{layer}={OURS}", text, where)
        elif op in CALLED_BY:
            self._ops.append((op, text, where))

    def check_called(self, choices: Choices) -> None:
        """Raise ConfigError for an op that somebody chose and nothing would call."""
        for op, text, where in self._ops:
            slot = CALLED_BY[op]
            if not choices.is_ours(slot):
                raise ConfigError(
                    f"{where}: {text!r}: nothing would call {op}: {slot} is left to vLLM; choose "
                    f"{slot}={choices.parts.choices[slot].option} too"
                )

    def _give(self, text: str, typed: str, where: str) -> None:
        """One for vLLM's tree; ``typed`` is what the user wrote."""
        if text not in self.for_vllm:
            self.for_vllm.append(text)
        self.sources[text] = Origin(where, text=typed, named=True)

    def _check_slot(self, words: Words, place: str) -> None:
        slot = words.slot
        if slot in SHUT:
            raise ConfigError(f"{place}: vLLM offers no hook for {slot}: {SHUT[slot]}")
        if not words.equals:
            raise ConfigError(f"{place} is not an override; write key=value or group=option")
        if slot not in SLOTS and slot != "trust":
            raise ConfigError(
                f"{place}: no slot {slot!r} in vLLM; there are "
                f"{', '.join(SLOTS)}{nearest(slot, [*SLOTS, 'trust'])}"
            )
