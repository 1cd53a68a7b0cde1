"""The pages name files, functions and slots that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_di.components import interfaces, messages
from vllm_di.containers.slots import SLOTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = ROOT / "src/vllm_di"
FILE = r"[\w.-]+(?:/[\w.-]+)+\.(?:py|cpp|h|yaml)"
EXAMPLES = ("mychip", "mymodels", "acme", "mine")
PAGES = [
    *(DOCS / name for name in ("architecture.md", "glossary.md", "writing-a-component.md")),
    *sorted((DOCS / "howto").glob("*.md")),
]


def section(page: str, title: str) -> str:
    """The text below ``## title``, up to the next title."""
    text = (DOCS / page).read_text()
    assert f"\n## {title}\n" in text, f"docs/{page} has no section {title!r}"
    return re.split(r"\n## ", text.split(f"\n## {title}\n")[1])[0]


def test_the_walk_names_each_file_once() -> None:
    """With the names that are said to be in it."""
    walk = section("architecture.md", "One request, from socket to kernel")
    files = re.findall(rf"`({FILE})`", walk)
    assert len(files) > 40
    assert sorted(files) == sorted(set(files)), "a file is named twice"
    for file in files:
        assert (SOURCES / file).is_file(), f"docs/architecture.md: there is no {file}"
    for file, names in re.findall(rf"`({FILE})`:((?:,?\s+`\w+`)+)", walk):
        text = (SOURCES / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", text), f"docs/architecture.md: no {name} in {file}"


def test_every_slot_is_on_the_page_of_the_containers() -> None:
    table = section("architecture.md", "Three containers")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.rpartition("|")[0])]
    assert {name for name in named if name.islower()} == set(SLOTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Below the root, ``src/vllm_di``, ``components`` or ``docs``, but those of an example."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for file in re.findall(rf"`({FILE})`", text):
        if any(example in file for example in EXAMPLES):
            continue
        folders = (ROOT, SOURCES, SOURCES / "components", DOCS)
        found = [folder for folder in folders if (folder / file).exists()]
        assert found, f"{page.name}: there is no {file}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_members_of_interfaces_that_vendors_are_told_of_are_there() -> None:
    text = (DOCS / "vendors.md").read_text()
    pairs = re.findall(r"`([A-Z]\w+)\.(\w+)`", text)
    assert len(pairs) > 15
    for cls, member in pairs:
        owner = getattr(interfaces, cls, None) or getattr(messages, cls)
        annotated = getattr(owner, "__annotations__", {})
        assert hasattr(owner, member) or member in annotated, f"there is no {cls}.{member}"
