"""The blocks of code of every page, and the class that ``blocks.yaml`` gives each."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "blocks.yaml"
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
CLASSES = ("commands", "shown", "test")
HOW = ("run", "slow", "not")


class Block(NamedTuple):
    """One piece of code of a page, between fences or indented."""

    page: str
    line: int
    language: str
    """Behind the fence; empty for an indented block."""
    text: str

    @property
    def begins(self) -> str:
        """The first line, by which it is known."""
        return self.text.splitlines()[0].strip()

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    return [*(ROOT / name for name in PAGES), *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def blocks() -> tuple[Block, ...]:
    """All of them, in the order of the pages."""
    return tuple(block for page in pages() for block in blocks_of(page))


def blocks_of(page: Path) -> Iterator[Block]:
    name, lines = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        begin, fence = number, re.match(r"\s*(`{3,})(\w*)", lines[number])
        number += 1
        if fence:
            while not lines[number].lstrip().startswith(fence[1]):
                number += 1
            inner = lines[begin + 1 : number]
            yield Block(name, begin + 2, fence[2], textwrap.dedent("\n".join(inner)))
            number += 1
        elif re.match(r" {4}\s*\S", lines[begin]) and (not begin or not lines[begin - 1].strip()):
            while number < len(lines) and re.match(r" {4}|\s*$", lines[number]):
                number += 1
            text = textwrap.dedent("\n".join(lines[begin:number])).strip("\n")
            yield Block(name, begin + 1, "", text)


@cache
def data() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return found


def class_of(block: Block) -> dict[str, str]:
    """One of CLASSES, with what belongs to it; empty where the data has nothing for the block."""
    known = data()["pages"].get(block.page, {})
    found = known.get(block.begins, known.get(f"({block.language})", {}))
    return {found: ""} if isinstance(found, str) else dict(found)


def commands() -> dict[str, Block]:
    """Command, without its comment, to the first block that has it."""
    found: dict[str, Block] = {}
    for block in blocks():
        if "commands" in class_of(block):
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                if command := re.sub(r"(^|\s)# .*$", "", line).strip():
                    found.setdefault(" ".join(command.split()), block)
    return found


def within_sentences() -> dict[str, str]:
    """Command in the running text to the first page that has it."""
    found: dict[str, str] = {}
    for page in pages():
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for command in re.findall(r"`((?:vllm-di|make) [^`\n]+)`", text):
            found.setdefault(command, str(page.relative_to(ROOT)))
    return found


def how(command: str) -> dict[str, str]:
    """One of HOW, with its reason; empty for a command that the data does not have."""
    found = data()["commands"].get(command, {})
    return {found: ""} if isinstance(found, str) else dict(found)


def commands_that(kind: str) -> list[str]:
    return [command for command in commands() if kind in how(command)]
