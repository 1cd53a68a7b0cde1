"""An override as text: ``attention=sdpa``, ``+device.x=1``, ``~model.y``. Hydra parses its value;
this is for whoever must sort overrides before, and for the commands that never load Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm_di.containers.origins import Origin


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


def repeated(overrides: Sequence[str], sources: Mapping[str, Origin]) -> list[str]:
    """A line for each override that a later one of the same key, from the same source, replaces.
    One from another source (a variable of the environment) is there to be replaced."""
    lines, before = [], dict[tuple[str, str], str]()
    for text in overrides:
        origin, key = sources.get(text), read(text).key
        source = origin.chosen_by if origin else "command line"
        earlier = before.get((source, key), text)
        if earlier != text:
            lines.append(
                f"{source}: {key} is set twice: the last, {text}, holds, and {earlier} is not used"
            )
        before[source, key] = text
    return lines


def model_overrides(model: str) -> list[str]:
    """What ``--model`` and ``LLM(model)`` mean: a path or a hub name where it has a ``/``, ``.`` or
    backslash, else an option of the group ``model``."""
    looks_like_path = any(c in model for c in "/.\\")
    return ["model=local", f"model.path={model}"] if looks_like_path else [f"model={model}"]
