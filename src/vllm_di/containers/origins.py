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
    """Where a dotted key came from; its parent's place when it has none itself."""
    while key:
        if origin := origins.get(key):
            return str(origin)
        key = key.rpartition(".")[0]
    return "config"


class YamlFile(msgspec.Struct, frozen=True):
    """A config file read for its places and texts, not for its values."""

    path: Path
    lines: dict[str, int]
    """Dotted key to line, from 1. Inner mappings count too."""
    texts: dict[str, str]
    """Dotted key to the comment behind it: what ``--help`` prints."""
    chooses: dict[str, tuple[str, int]]
    """Group to (option, line), from the defaults list, ``override`` entries included."""
    includes: tuple[str, ...]
    """Options of the same group that it builds on, from the defaults list."""
    is_global: bool
    """True when the file's keys are those of the whole config, not of its group."""
    summary: str
    """The comment at the top, or nothing."""


def read_yaml(path: Path) -> YamlFile:
    """Read one file's places. Raises yaml.YAMLError for a file that is not YAML."""
    text = path.read_text(encoding="utf-8")
    rows = text.splitlines()
    lines: dict[str, int] = {}
    chooses: dict[str, tuple[str, int]] = {}
    includes: list[str] = []

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            if name == "defaults" and isinstance(value, yaml.SequenceNode):
                _read_defaults(value, chooses, includes)
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
    return YamlFile(path, lines, texts, chooses, tuple(includes), is_global, summary)


def _read_defaults(
    node: yaml.SequenceNode, chooses: dict[str, tuple[str, int]], includes: list[str]
) -> None:
    for item in node.value:
        if isinstance(item, yaml.MappingNode) and item.value:
            key, value = item.value[0]
            group = key.value.removeprefix("override ").strip().lstrip("/").split("@")[0]
            chooses[group] = (str(value.value), key.start_mark.line + 1)
        elif isinstance(item, yaml.ScalarNode) and item.value != "_self_":
            includes.append(item.value)
