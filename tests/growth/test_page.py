"""docs/growth.md: what it names is there, and no case touches more than five files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_di.components import interfaces, messages

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/growth.md").read_text(encoding="utf-8")
TITLES = [
    "Drafts from the prompt",
    "A draft model elsewhere",
    "Adapters",
    "More KV groups",
    "Structured output",
    "Embeddings",
    "A prefill/decode split",
    "Ray",
    "Latent attention (MLA)",
]
TABLE, *SECTIONS = re.split(r"\n## ", PAGE)
CASES = dict(section.split("\n", 1) for section in SECTIONS)
ROWS = [line.split(" | ") for line in TABLE.splitlines() if re.match(r"\| [a-z]|\| Ray", line)][1:]


def touched(case: str) -> tuple[int, list[str]]:
    """The number that a section says, and the files that its sentence lists."""
    found = re.search(r"\nTouches (\d+) files(.*?)(?:\.\s|$)", CASES[case], re.DOTALL)
    assert found, case
    return int(found[1]), re.findall(r"`([\w/]+\.py)`", found[2])


def test_the_nine_cases_are_there() -> None:
    assert list(CASES) == TITLES
    assert [row[0].removeprefix("| ").lower() for row in ROWS] == [t.lower() for t in TITLES]


@pytest.mark.parametrize("case", TITLES)
def test_a_case_touches_at_most_five_files(case: str) -> None:
    count, files = touched(case)
    assert count == len(set(files)) == len(files) <= 5
    assert ROWS[TITLES.index(case)][2] == str(count)
    for file in files:
        assert (ROOT / "src/vllm_di" / file).is_file(), file


def test_the_names_of_the_page_are_those_of_the_interfaces() -> None:
    names = re.findall(r"`([A-Z]\w+)(?:\.(\w+))?`", PAGE)
    assert len(names) > 40
    for owner, member in names:
        cls = getattr(interfaces, owner, None) or getattr(messages, owner, None)
        assert cls is not None, owner
        known = {name for base in cls.__mro__ for name in (*vars(base), *_annotations(base))}
        assert not member or member in known, f"{owner} has no {member}"


def _annotations(cls: type) -> list[str]:
    return list(vars(cls).get("__annotations__", {}))


def test_the_tests_that_the_page_names_are_there() -> None:
    files = set(re.findall(r"`(tests/[\w/.]+\.py)`", PAGE))
    assert "tests/growth/test_growth.py" in files
    for file in files:
        assert (ROOT / file).is_file(), file
    proofs = (ROOT / "tests/growth/test_growth.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in proofs, name
