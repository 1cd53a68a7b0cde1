"""What a client is told of a value that its type does not take: where it is, and what may stand
there."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from vllm_di.errors import nearest

_STEP = re.compile(r"\.(\w+)|\[[\d.]+\]")
"""msgspec's words for a field, or for an item of a list, whose name is then empty."""
_WRONG = re.compile(r"Invalid (?:enum )?value '(.*)'", re.DOTALL)
MOST = 300
"""Characters of a message: it may hold what the client sent."""


def misfit(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> tuple[str, str | None]:
    """-> (message, the field of ``kind``)."""
    message, has_place, place = str(error).rpartition(" - at ")
    if not has_place:
        message, place = place, ""
    key, where = place.startswith("`key` in "), place.partition("$")[2].rstrip("`").lstrip(".")
    field = re.match(r"\w+", where)
    wrong = _WRONG.fullmatch(message)
    if wrong and (options := sorted(set(_options(kind, _STEP.findall(f".{where}"))))):
        shown = wrong[1][:80]
        message = f"expected {', '.join(options)}, got {shown!r}{nearest(shown, options)}"
    shown_place = f"{'a key of ' if key else ''}{where}" if where else "the body"
    return f"{shown_place}: {message[:MOST]}", field[0] if field else None


def _options(hint: Any, steps: Sequence[str]) -> Iterator[str]:
    """The texts that may stand at a place: of a ``Literal``, or of the tag of a struct."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        yield from _options(args[0], steps)
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            yield from _options(arg, steps)
    elif origin is typing.Literal and not steps:
        yield from map(str, args)
    elif origin is list and steps[:1] == [""]:
        yield from _options(args[0], steps[1:])
    elif isinstance(hint, type) and issubclass(hint, msgspec.Struct) and steps:
        if steps == [hint.__struct_config__.tag_field]:
            yield str(hint.__struct_config__.tag)
        for field in msgspec.structs.fields(hint):
            if field.encode_name == steps[0]:
                yield from _options(field.type, steps[1:])
