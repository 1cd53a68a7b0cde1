"""An override as text: ``attention=sdpa``, ``+device.x=1``, ``~model.y``. Hydra parses its value;
this is for whoever must sort overrides before, and for the commands that never load Hydra."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """The parts of one override."""

    sign: str
    """``+``, ``++``, ``~`` or nothing."""
    key: str
    """A group, or a dotted key."""
    equals: str
    """``=``, or nothing where there is none."""
    value: str
    """As it was typed."""

    @property
    def slot(self) -> str:
        """The first part of the key."""
        return self.key.split(".")[0]


def read(text: str) -> Words:
    """Split an override into its parts. Never fails: Hydra reports what is malformed."""
    left, equals, value = text.partition("=")
    key = left.lstrip("+~")
    return Words(left[: len(left) - len(key)], key, equals, value)


def model_overrides(model: str) -> list[str]:
    """What ``--model`` and ``LLM(model)`` mean: a path or a hub name where it has a ``/``, ``.`` or
    backslash, else an option of the group ``model``."""
    looks_like_path = any(c in model for c in "/.\\")
    return ["model=local", f"model.path={model}"] if looks_like_path else [f"model={model}"]
