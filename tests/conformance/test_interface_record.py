"""The record of the interfaces is that of the sources, and a minor version breaks nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from vllm_di.components.interfaces import INTERFACE_VERSION
from vllm_di.conformance.interface_record import Record, changelog, changes, main, read, record

FOLDER = Path(__file__).parents[2] / "docs" / "interfaces"
COMMAND = "python -m vllm_di.conformance.interface_record docs/interfaces"


def test_the_record_is_that_of_the_sources() -> None:
    recorded = {item.version: item for item in read(FOLDER)}
    assert recorded[INTERFACE_VERSION] == record(), f"the interfaces changed: run {COMMAND}"
    text = (FOLDER / "changes.md").read_text(encoding="utf-8")
    assert text == changelog(read(FOLDER)), f"run {COMMAND}"


def test_a_minor_breaks_nothing() -> None:
    """A change that breaks asks for a new major: raise INTERFACE_VERSION, or keep the old form."""
    records = read(FOLDER)
    for old, new in itertools.pairwise(records):
        if old.order[0] == new.order[0]:
            assert [c for c in changes(old, new) if c.breaks] == []


OLD = '''
INTERFACE_VERSION = "1.0"
Kind = Literal["a", "b"]

class Device(ABC):
    """A device."""
    name: str
    """Its name."""
    size: int = 1

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed it."""

    def close(self) -> None: ...

    def _own(self) -> None: ...
'''


def recorded(folder: Path, source: str) -> Record:
    path = folder / "source.py"
    path.write_text(source)
    return record((path,))


@pytest.mark.parametrize(
    ("old", "new", "what", "name", "breaks"),
    [
        ("seed: int)", "seed: int, fast: dict[str, int]=None)", "extended", "Device.seed", False),
        ("seed: int)", "seed: int, fast: bool)", "changed", "Device.seed", True),
        ("seed: int)", "seed: str)", "changed", "Device.seed", True),
        (
            "def seed(self, seed: int) -> None",
            "def seed(self, seed: int) -> int",
            "changed",
            "",
            True,
        ),
        ("Seed it.", "Seed it, in 64 bits.", "described differently", "Device.seed", False),
        ("Its name.", "The name.", "described differently", "Device.name", False),
        ("size: int = 1", "size: int = 2", "changed", "Device.size", True),
        ("size: int = 1", "", "removed", "Device.size", True),
        ("size: int = 1", "size: int = 1\n    more: int = 0", "added", "Device.more", False),
        ("size: int = 1", "size: int = 1\n    more: int", "added", "Device.more", True),
        ("    def close", "    @abstractmethod\n    def close", "changed", "Device.close", True),
        ('"a", "b"]', '"a", "b", "c"]', "extended", "Kind", False),
        ('"a", "b"]', '"a"]', "changed", "Kind", True),
        ("def close", "def shut", "removed", "Device.close", True),
        ("    def cl", "    @deprecated('a b')\n    def cl", "deprecated", "Device.close", False),
        ("def _own", "def _other", "", "", False),
        ("# nothing", "", "", "", False),
    ],
)
def test_changes(tmp_path: Path, old: str, new: str, what: str, name: str, breaks: bool) -> None:
    before = recorded(tmp_path, OLD)
    found = changes(before, recorded(tmp_path, OLD.replace(old, new)))
    if not what:
        assert found == []
        return
    change = next(c for c in found if c.what == what)
    assert change.breaks == breaks
    assert name in ("", change.name)


def test_of_a_new_class_nothing_is_missing(tmp_path: Path) -> None:
    new = (
        OLD + "\n\nclass Other(ABC):\n    size: int\n    @abstractmethod\n    def run(self): ...\n"
    )
    found = changes(recorded(tmp_path, OLD), recorded(tmp_path, new))
    assert {c.name for c in found} == {"Other", "Other.size", "Other.run"}
    assert not any(c.breaks for c in found)


def test_the_command_writes_record_and_changelog(tmp_path: Path) -> None:
    main(tmp_path)
    assert read(tmp_path) == [record()]
    assert f"## {INTERFACE_VERSION}" in (tmp_path / "changes.md").read_text()
