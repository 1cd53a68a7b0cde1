"""Where the value stands that a component refuses: the override that a person typed, before the
line of the class that says so."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vllm_di.containers.assembly import Assembly
from vllm_di.containers.origins import Origin
from vllm_di.containers.slots import SLOTS
from vllm_di.errors import ConfigError

_KEY = re.compile(r"(?<![\w.])[a-z_]\w*(?:\.\w+)*")


def placed(error: ConfigError, assembly: Assembly, path: str, before: str) -> ConfigError:
    """``error``, which the constructor of the component at ``path`` raised, with place and path
    before its message. ``before`` is the prefix of the worker's keys.

    An error with a ``key`` is about that one. Any other names keys (``model.max_model_len``, or
    ``dtype`` of its own node at the beginning) and options (``kv_layout=hnd``): the first that a
    person set is meant, else the key at the beginning, else the component itself.
    """
    message = str(error)
    if error.key is not None:
        path = _full(assembly, error.key, before)
        origin = assembly.origins.get(path)
    else:
        origins = list(_named(assembly, path, before, message))
        origin = next((o for o in origins if o.by_user), None) or _first(assembly, path, message)
    place = str(origin) if origin else assembly.place(f"{path}._target_")
    return type(error)(f"{place}: {path}: {message.removeprefix(f'{path}: ')}")


def _named(assembly: Assembly, path: str, before: str, message: str) -> Iterator[Origin]:
    """The origins of what a message names, in its order."""
    if own := _first(assembly, path, message):
        yield own
    for found in _KEY.finditer(message):
        key, is_option = found[0], message[found.end() : found.end() + 1] == "="
        if key.split(".")[0] in SLOTS and ("." in key or is_option):
            origin = _origin(assembly, _full(assembly, key, before))
            if origin is not None:
                yield origin


def _first(assembly: Assembly, path: str, message: str) -> Origin | None:
    """The origin of the key of the component's own node that a message begins with."""
    found = _KEY.match(message)
    while found and path:
        if origin := assembly.origins.get(f"{path}.{found[0]}"):
            return origin
        path = path.rpartition(".")[0]  # a component within may name its key from the slot's node
    return None


def _full(assembly: Assembly, key: str, before: str) -> str:
    """A key as a component writes it, with the prefix of the worker where its slot is one of the
    worker's."""
    return before + key if f"{before}{key.split('.')[0]}" in assembly.choices else key


def _origin(assembly: Assembly, key: str) -> Origin | None:
    """Of a dotted key, or of the choice of a slot. None where it has no place of its own."""
    if key in assembly.choices:
        chosen = assembly.choices[key].origin
        return chosen if chosen.by_user else assembly.origins.get(f"{key}._target_")
    return assembly.origins.get(key)
