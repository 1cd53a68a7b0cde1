"""The pages of reference: every group, option, key, field of a manifest, verb and flag is there,
by a walk over the YAML files that shares nothing with what makes the pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from docsite.reference import MANIFEST, pages, sections
from docsite.types import described, field_texts, value

from vllm_di.commands.arguments import ALIASES, VERB_OPTIONS, VERB_SWITCHES, VERBS
from vllm_di.components.interfaces import OpTable
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.containers.manifest import Manifest
from vllm_di.containers.ports import conf_of_project
from vllm_di.containers.signatures import keys_of
from vllm_di.containers.tree import ConfigFiles
from vllm_di.server.app import OpenAiServer

CONF = Path(__file__).parents[2] / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for name, inner in node.items():
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, f"{prefix}{name}.")
        elif name != "_target_":
            yield f"{prefix}{name}"


def part(page: str, heading: str) -> str:
    """What stands below a heading, up to the next."""
    found = re.search(rf"^## {re.escape(heading)}( \{{[^\n]*)?$(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found, f"no heading {heading!r}"
    return found[2]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_and_key(group: str, made: dict[str, str]) -> None:
    page = made[f"reference/{group}.md"]
    files = sorted((CONF / group).glob("*.yaml"))
    assert files
    for file in files:
        text = part(page, "Shared keys" if file.stem == "base" else f"{group}={file.stem}")
        content = yaml.safe_load(file.read_text()) or {}
        content.pop("defaults", None)
        target = content.get("_target_", "auto")
        assert target == "auto" or file.stem == "base" or f"`{target}`" in text
        for key in leaves(content):
            if key.split(".")[0] in ("stages", "workers"):
                assert key.rpartition(".")[2] in text
                continue
            shown = key if group == "platform" else f"{group}.{key}"
            row = re.search(rf"^\| `{re.escape(shown)}` \|.*$", text, re.M)
            assert row, f"{file.name}: {shown} is not on the page"
            assert not row[0].endswith("|  |"), f"{file.name}: {shown} has no text"
            if group != "platform":
                assert "| any |" not in row[0], f"{file.name}: {shown} has no type"


def test_every_op_is_a_key(made: dict[str, str]) -> None:
    page = made["reference/ops.md"]
    for op in OpTable.OPS:
        assert f"\n| `ops.{op}` | component (`OpLibrary`) or text | `auto` |" in page


def test_every_group_is_in_the_index_and_in_the_navigation(made: dict[str, str]) -> None:
    index = made["reference/index.md"]
    for group in GROUPS:
        assert f"| [`{group}`]({group}.md) |" in index
    tree = ConfigFiles([conf_of_project()])
    placed = [group for groups in sections(tree).values() for group in groups]
    assert sorted(placed) == GROUPS
    root = yaml.safe_load((CONF / "config.yaml").read_text())
    root.pop("defaults")
    for key in leaves(root):
        assert f"\n| `{key}` |" in index


def test_every_verb_and_flag(made: dict[str, str]) -> None:
    page = made["reference/commands.md"]
    for verb, text in VERBS.items():
        below = part(page, verb)
        assert text[1:].replace("|", "&#124;") in below
        for flag in VERB_SWITCHES.get(verb, {}) | VERB_OPTIONS.get(verb, {}):
            assert f"\n| `{flag}` |" in below
    for flag in ALIASES:
        assert f"\n| `{flag}` |" in page


def test_every_field_of_a_manifest(made: dict[str, str]) -> None:
    page = part(made["reference/platform.md"], "The manifest")
    for prefix, cls in MANIFEST.items():
        for name in cls.__struct_fields__:
            if f"{prefix}.{name}" not in MANIFEST:
                assert f"\n| `{prefix}.{name}` |" in page
    assert "`declared` or `contract-tested` or" in page
    assert field_texts(Manifest)["name"] == "The option's name."


@pytest.mark.parametrize(
    ("cls", "key", "kind", "default"),
    [
        (OpenAiServer, "port", "whole number", None),
        (CpuOps, "rows_for_tiles", "or null", None),
    ],
)
def test_types_are_those_of_the_constructors(cls: type, key: str, kind: str, default: Any) -> None:
    assert kind in described(keys_of(cls)[key].hint)


def test_types_in_words() -> None:
    def words(hint: Any) -> str:
        return described(hint)

    from typing import Annotated, Literal

    class Inner(msgspec.Struct):
        first: int
        second: str

    assert words(Annotated[int, msgspec.Meta(ge=1, le=9)] | None) == (
        "whole number (1 or more, 9 at most) or null"
    )
    assert words(Literal["a", "b"]) == "`a` or `b`"
    assert words(list[str]) == words(tuple[str, ...]) == "list of text"
    assert words(dict[str, int]) == "mapping to whole number"
    assert words(Inner) == "mapping of first, second"
    assert value([1, "a", None, True]) == "[1, a, null, true]"
    assert value({}) == "{}"
