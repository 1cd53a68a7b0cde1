"""Where a value of the config came from: a line of a YAML file, an override, the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_COMMENT = re.compile(r"\s#\s?(.*)$")


class Origin(msgspec.Struct, frozen=True, omit_defaults=True):
    """One source. ``str()`` is the place as an error message shows it."""

    chosen_by: str
    """``default``, ``platform``, ``model``, another group's name, ``command line``, ``checkpoint``,
    ``auto``, or what a caller calls its overrides."""
    file: str | None = None
    line: int | None = None
    text: str | None = None
    """The override as typed, or the reason of an automatic choice."""
    named: bool = False
    """Whether ``chosen_by`` is a caller's name for the place of an override (``env DI_CONFIG``)."""

    @property
    def by_user(self) -> bool:
        """Whether a person chose this value by an override, which beats what is found."""
        return self.named or self.chosen_by == "command line"

    def __str__(self) -> str:
        if self.file:
            return f"{self.file}:{self.line}" if self.line else self.file
        return f"{self.chosen_by}: {self.text}" if self.text else self.chosen_by


def place_of(origins: Mapping[str, Origin], key: str) -> str:
    """Where a dotted key came from; where it has no place itself that of a key below which a person
    set, else its parent's."""
    if key not in origins and (below := [k for k in origins if k.startswith(f"{key}.")]):
        key = next((k for k in below if origins[k].by_user), key)
    while key:
        if origin := origins.get(key):
            return str(origin)
        key = key.rpartition(".")[0]
    return "config"


class Default(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a file's ``defaults`` list."""

    text: str
    line: int
    group: str | None = None
    """As written, with its ``/``; None for an option of the file's own folder."""
    option: str | None = None
    """None where the group is left empty. Neither group nor option: no entry that makes sense."""
    package: str = ""
    is_override: bool = False
    is_optional: bool = False


class YamlFile(msgspec.Struct, frozen=True):
    """A config file read for its places and texts, not for its values."""

    path: Path
    lines: dict[str, int]
    """Dotted key to line, from 1. Inner mappings count too."""
    texts: dict[str, str]
    """Dotted key to the comment behind it: what ``--help`` prints."""
    defaults: tuple[Default, ...]
    """Its defaults list."""
    is_global: bool
    """True when the file's keys are those of the whole config, not of its group."""
    summary: str
    """The comment at the top, or nothing."""

    @property
    def chooses(self) -> dict[str, tuple[str, int]]:
        """Group to (option, line), from the defaults list, ``override`` entries included."""
        return {d.group.lstrip("/"): (str(d.option), d.line) for d in self.defaults if d.group}

    @property
    def includes(self) -> tuple[str, ...]:
        """Options of the same group that it builds on, from the defaults list."""
        options = (d.option for d in self.defaults if d.group is None)
        return tuple(o for o in options if o is not None and o != "_self_")


def read_yaml(path: Path) -> YamlFile:
    """Read one file's places. Raises yaml.YAMLError for a file that is not YAML."""
    text = path.read_text(encoding="utf-8")
    rows = text.splitlines()
    lines: dict[str, int] = {}
    defaults: list[Default] = []

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            if name == "defaults" and isinstance(value, yaml.SequenceNode):
                defaults.extend(_read_default(item, rows) for item in value.value)
            else:
                walk(value, f"{name}.")

    walk(yaml.compose(text, Loader=_Loader), "")
    lines.pop("defaults", None)
    texts = {k: m[1] for k, n in lines.items() if (m := _COMMENT.search(rows[n - 1]))}
    head = []
    for row in rows:
        if row.startswith("#"):
            head.append(row.lstrip("# "))
        elif head or row.strip():
            break
    summary = " ".join(row for row in head if not row.startswith("@package"))
    is_global = "@package _global_" in head
    return YamlFile(path, lines, texts, tuple(defaults), is_global, summary)


def _read_default(item: yaml.Node, rows: list[str]) -> Default:
    line = item.start_mark.line + 1
    if isinstance(item, yaml.ScalarNode):
        return Default(text=item.value, line=line, option=item.value)
    if not isinstance(item, yaml.MappingNode) or len(item.value) != 1:
        return Default(text=rows[line - 1].strip(), line=line)
    key, value = item.value[0]
    *words, name = str(key.value).split()
    group, _, package = name.partition("@")
    is_none = value.tag == "tag:yaml.org,2002:null" or not isinstance(value, yaml.ScalarNode)
    return Default(
        text=f"{key.value}: {value.value}",
        line=line,
        group=group,
        option=None if is_none else str(value.value),
        package=package,
        is_override="override" in words,
        is_optional="optional" in words,
    )
