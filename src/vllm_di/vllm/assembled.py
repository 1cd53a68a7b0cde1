"""One process's view of the choices: a VllmContainer whose slots are filled when vLLM first asks,
and this project's parts, opened once the worker knows its model."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
from collections import Counter
from contextlib import ExitStack
from typing import Any

from dependency_injector.providers import Singleton

from vllm_di.containers.schema import find_class
from vllm_di.errors import ConfigError
from vllm_di.parts import Parts, assemble_parts, explain_parts, open_parts
from vllm_di.vllm import versions
from vllm_di.vllm.choices import OURS, Choices, choose
from vllm_di.vllm.container import SLOTS, VllmContainer
from vllm_di.vllm.sources import Override, overrides_of

COMPONENTS = {"attention": ("attention", "kv_layout"), "ops": ("ops",)}
"""Slot to the parts of this project that its adapter needs; by default the slot's own."""


class Assembled:
    """The container of one process of vLLM."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        text = json.dumps(choices.overrides).encode()
        self.key = hashlib.sha256(text).hexdigest()[:16]
        """Names these choices, the same in each start."""
        self.calls: Counter[str] = Counter()
        """What the adapters ran, by name: read by ``vllm_di_report``."""
        self.container = VllmContainer()
        self.container.override_providers(**{slot: Singleton(self._build, slot) for slot in SLOTS})
        self._opened: Parts | None = None

    def get(self, slot: str) -> Any:
        """What a slot holds: a class, or None for vLLM's own choice. Raises ConfigError."""
        return self.container.providers[slot]()

    def check(self) -> None:
        """Import every class that somebody chose, and hold it against vLLM's interface and this
        project's. Builds nothing. Raises ConfigError."""
        for slot in SLOTS:
            self.get(slot)
        check_parts(self.choices)

    @property
    def parts(self) -> Parts:
        """This project's parts. Raises ConfigError before the worker opens them."""
        if self._opened is None:
            raise ConfigError("the parts of vllm-di are opened by its worker before the model is")
        return self._opened

    def open(self, stack: ExitStack, vllm_config: Any) -> None:
        """Open the parts for a model, until ``stack`` closes. Raises ConfigError."""
        slots = [s for s in ("attention", "ops", "quantization") if self.choices.is_ours(s)]
        if not slots:
            return
        size = vllm_config.cache_config.block_size
        overrides = [
            *for_parts(self.choices),
            (f"kv_layout.block_size={size}", "vLLM's block size"),
        ]
        names = [part for slot in slots for part in COMPONENTS.get(slot, (slot,))]
        platform = self.choices.nodes["platform"]["parts"]
        assembly = assemble_parts(overrides, platform=platform)
        dtype = vllm_config.model_config.dtype
        self._opened = stack.enter_context(open_parts(assembly, dtype=dtype, only=names))

    # -- filling -------------------------------------------------------------------------------

    def _build(self, slot: str) -> Any:
        choices = self.choices
        if choices.is_stock(slot) and slot != "platform":
            return None
        if slot == "ir_op_priority":
            return {op: str(v).split(",") for op, v in choices.nodes[slot].items() if v}
        if slot == "ops":
            return {name: self._layer(name, value) for name, value in choices.layers.items()}
        place = choices.place(f"{slot}._target_")
        return self._class(choices.nodes[slot]["_target_"], place, slot, slot)

    def _layer(self, name: str, value: str) -> type:
        if value == OURS:
            value = f"vllm_di.vllm.adapters.layers.{name}"
        key = f"ops.layers.{name}"
        return self._class(value, self.choices.place(key), key, "ops")

    def _class(self, target: Any, place: str, key: str, slot: str) -> type:
        if not isinstance(target, str):
            raise ConfigError(f"{place}: {key}: expected the name of a class, got {target!r}")
        found = find_class(target, self.choices.packages, place, key)
        module, _, name = SLOTS[slot].interface.rpartition(".")
        interface = getattr(importlib.import_module(module), name)
        if not issubclass(found, interface):
            raise ConfigError(f"{place}: {key}: {target} does not extend vLLM's {module}.{name}")
        if inspect.isabstract(found):
            lacks = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            raise ConfigError(
                f"{place}: {key}: {target} implements {name} in part; it lacks {lacks}"
            )
        return found


def for_parts(choices: Choices) -> list[Override]:
    """The overrides that went to this project's parts."""
    origins = choices.parts.origins
    chosen = [c.origin for c in choices.parts.choices.values()]
    known = {o.text: o.chosen_by for o in [*origins.values(), *chosen] if o.named and o.text}
    return [(text, where) for text, where in choices.overrides if text in known]


def check_parts(choices: Choices) -> None:
    """Hold this project's classes and their keys against their interfaces. Raises ConfigError."""
    if any(choices.is_ours(slot) for slot in SLOTS if slot != "platform"):
        explain_parts(choices.parts)


def current(vllm_config: Any = None) -> Assembled:
    """What was chosen for the engine of a config: by default of the one that vLLM builds right now.
    Raises ConfigError."""
    config = vllm_config if vllm_config is not None else versions.current_config()
    return _assembled(tuple(overrides_of(config)))


@functools.lru_cache(maxsize=8)
def _assembled(overrides: tuple[Override, ...]) -> Assembled:
    """vLLM builds the adapters itself and hands them no object of ours: they find it by the
    overrides, which are the same all over an engine."""
    return Assembled(choose(overrides))
