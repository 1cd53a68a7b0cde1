"""Types of keys and their texts, as a reader of the reference sees them."""

from __future__ import annotations

import ast
import collections.abc
import inspect
import json
import types
import typing
from abc import ABCMeta
from typing import Any, Literal

import msgspec

NAMES = {str: "text", bool: "true or false", int: "whole number", float: "number", Any: "any"}
BOUNDS = {
    "ge": "{} or more",
    "gt": "more than {}",
    "le": "{} at most",
    "lt": "less than {}",
    "min_length": "length {} or more",
    "max_length": "length {} at most",
    "multiple_of": "a multiple of {}",
    "pattern": "of the form {}",
}


def described(hint: Any) -> str:
    """A type in words: ``whole number (1 or more) or null``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, type(None)):
        return "null"
    if origin is typing.Annotated:
        bounds = [b for part in args[1:] if isinstance(part, msgspec.Meta) for b in _bounds(part)]
        return described(args[0]) + (f" ({', '.join(bounds)})" if bounds else "")
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        parts = [described(arg) for arg in sorted(args, key=lambda arg: arg is type(None))]
        return " or ".join(dict.fromkeys(parts))
    if origin is collections.abc.Callable:  # a component that is built when it is first called
        return described(args[-1])
    if origin in (list, tuple, set, frozenset, collections.abc.Sequence):
        items = [arg for arg in args if arg is not Ellipsis]
        if origin is tuple and len(items) == len(args):
            return f"list of {len(items)}: {', '.join(described(arg) for arg in items)}"
        return f"list of {described(items[0])}" if items else "list"
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return f"mapping to {described(args[1])}" if args else "mapping"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"mapping of {', '.join(hint.__struct_fields__)}"
    if isinstance(hint, ABCMeta):
        return f"component (`{hint.__name__}`)"
    return NAMES.get(hint, f"`{getattr(hint, '__name__', hint)}`")


def _bounds(meta: msgspec.Meta) -> list[str]:
    found = ((form, getattr(meta, name)) for name, form in BOUNDS.items())
    return [form.format(bound) for form, bound in found if bound is not None]


def value(default: Any) -> str:
    """A value as one would write it in YAML or behind a key's ``=``."""
    if isinstance(default, str):
        return default or '""'
    if isinstance(default, list):
        return f"[{', '.join(value(item) for item in default)}]"
    return json.dumps(default, default=str)


def first_paragraph(cls: type) -> str:
    """Of a class's docstring; its own or the nearest that it inherits."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def field_texts(cls: type) -> dict[str, str]:
    """Field of a class to the text below it in the source."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
