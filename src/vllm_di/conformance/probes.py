"""The chosen classes under other names, watched: ``vllm_di.conformance.probes.KIND__DOTTED__NAME``
stands for the class DOTTED.NAME.

``Counting`` counts calls, ``Tracked`` what was built and closed, ``Failing`` cannot be built,
``Starved`` runs out of memory when it is told to. A node names them as its ``_target_``, as it
would name any other class, so that a choice made in config is seen to reach the part that runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from vllm_di.containers.slots import SLOTS

CALLS: Counter[str] = Counter()
"""Slot to the number of calls of its interface's methods, on the probe in that slot."""
BUILT: list[str] = []
"""Slots whose ``Tracked`` component was built, in order."""
CLOSED: list[str] = []
"""Slots whose ``Tracked`` component was closed, in order."""
STARVED: list[int] = []
"""Calls to come of a ``Starved`` program's ``run`` that work before one fails; empty: all do."""


class Injected(RuntimeError):
    """The failure that the suite injects."""


def name_of(kind: str, target: str) -> str:
    """The dotted name of a probe: ``Counting`` of ``a.b.C``."""
    return f"{__name__}.{kind}__{target.replace('_', '_u').replace('.', '_d')}"


@functools.cache
def __getattr__(name: str) -> type:
    kind, found, rest = name.partition("__")
    if not found or kind not in KINDS:
        raise AttributeError(name)
    module, _, cls = rest.replace("_d", ".").replace("_u", "_").rpartition(".")
    base = getattr(importlib.import_module(module), cls)
    slot = next(s for s, interface in SLOTS.items() if issubclass(base, interface))
    made = KINDS[kind](base, slot)
    made.__module__ = __name__
    return made


NO_USE = ("close", "describe", "recorder")
"""Methods that only describe or close a part: calling them does not count as using it."""


def counting(base: type, slot: str) -> type:
    names = [n for k in SLOTS[slot].__mro__[:-1] for n in vars(k) if not n.startswith("_")]
    counted = {n for n in names if n not in NO_USE}
    namespace: dict[str, Any] = {}
    set_plainly: Any = base.__setattr__
    for name in counted:
        method = getattr(base, name, None)
        if callable(method) and not isinstance(method, type):
            namespace[name] = _counted(slot, method)

    def assign(self: Any, name: str, value: Any) -> None:
        # a table of ops binds the chosen library's methods to itself in its constructor
        wrapped = name in counted and inspect.isroutine(value)
        set_plainly(self, name, _counted(slot, value) if wrapped else value)

    return type(f"Counting{base.__name__}", (base,), namespace | {"__setattr__": assign})


def _counted(slot: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        CALLS[slot] += 1
        return method(self, *args, **kwargs)

    return counted


def tracked(base: type, slot: str) -> type:
    def new(cls: type, *_args: Any, **_kwargs: Any) -> Any:
        BUILT.append(slot)
        return object.__new__(cls)

    def close(self: Any) -> None:
        CLOSED.append(slot)
        if hasattr(base, "close"):
            base.close(self)

    return _made("Tracked", base, __new__=new, close=close)


def failing(base: type, slot: str) -> type:
    def new(cls: type, *_args: Any, **_kwargs: Any) -> Any:
        raise Injected(slot)

    return _made("Failing", base, __new__=new)


def _made(kind: str, base: type, **members: Any) -> type:
    """A subclass whose constructor still reads as the base's: the signature is the schema."""
    members["__signature__"] = inspect.signature(base)
    return type(f"{kind}{base.__name__}", (base,), members)


def failing_at(base: type, slot: str, method: str) -> type:
    def fail(self: Any, *_args: Any, **_kwargs: Any) -> None:
        raise Injected(f"{slot}.{method}")

    return type(f"FailingAt{method}{base.__name__}", (base,), {method: fail})


def starved(base: type, slot: str) -> type:
    def run(self: Any, *args: Any) -> Any:
        if STARVED:
            STARVED[0] -= 1
            if STARVED[0] < 0:
                STARVED.clear()
                sequences = sum(count > 0 for count in args[0].query_lens_host)
                raise torch.OutOfMemoryError(f"injected into {sequences}")
        return base.run(self, *args)  # type: ignore[attr-defined]

    return _made("Starved", base, run=run)


KINDS: dict[str, Callable[[type, str], type]] = {
    "Counting": counting,
    "Tracked": tracked,
    "Failing": failing,
    "Starved": starved,
    "FailingLoad": lambda base, slot: failing_at(base, slot, "load"),
    "FailingAllocate": lambda base, slot: failing_at(base, slot, "allocate"),
    "FailingWarmup": lambda base, slot: failing_at(base, slot, "warm_up"),
}
