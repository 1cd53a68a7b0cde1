"""What a constructor takes, which is the schema of a node: its keys and their types."""

from __future__ import annotations

import inspect
import sys
import typing
from types import SimpleNamespace
from typing import Any

import msgspec

from vllm_di.containers.slots import DERIVED, GIVEN, SLOTS

INJECTED = {*SLOTS, *(n for names in GIVEN.values() for n in names)}
INJECTED |= {name for names in DERIVED.values() for name in names}
"""Parameters that the container fills; the others are keys of the node."""


class Parameter(typing.NamedTuple):
    """A key of a node, as the constructor declares it."""

    hint: Any
    """The type, with its ``Annotated`` bounds."""
    default: Any = inspect.Parameter.empty
    """``empty`` where the YAML has to give a value."""


def keys_of(cls: type) -> dict[str, Parameter]:
    """The keys of a node with the class ``cls``; the fields of a parameter ``config`` are keys
    too."""
    found: dict[str, Parameter] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in INJECTED:
            continue
        hint = hint_of(cls, parameter)
        if name == "config" and isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            hints = typing.get_type_hints(hint, include_extras=True)
            found |= {field: Parameter(hints[field]) for field in hint.__struct_fields__}
        else:
            found[name] = Parameter(hint, parameter.default)
    return found


def hint_of(
    cls: type, parameter: inspect.Parameter, seen: dict[tuple[str, str], Any] | None = None
) -> Any:
    """The annotation of one constructor parameter, evaluated where the class was written. ``seen``
    holds what was evaluated before, by module and text."""
    if parameter.annotation is parameter.empty:
        return Any
    seen = {} if seen is None else seen
    owner = next((c for c in cls.__mro__ if "__init__" in vars(c)), cls)
    key = owner.__module__, str(parameter.annotation)
    if key in seen:
        return seen[key]
    holder = SimpleNamespace(__annotations__={"x": parameter.annotation})
    namespace = vars(sys.modules[owner.__module__])
    hint = typing.get_type_hints(holder, namespace, include_extras=True)["x"]
    if isinstance(parameter.annotation, str):
        seen[key] = hint
    return hint
