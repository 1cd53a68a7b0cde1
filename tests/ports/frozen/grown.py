"""The engine with interfaces as a later minor may have them: one more field in each message and
value, one more optional method in each interface."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import vllm_di
from vllm_di.conformance.interface_record import SOURCES

FIELD = "    added_later: int = 0"
METHOD = "    def added_later(self, wanted: int = 0) -> int:\n        return wanted"
SOURCE = Path(vllm_di.__file__).parent


def is_value(node: ast.ClassDef) -> bool:
    """A dataclass or a msgspec struct."""
    decorators = [ast.unparse(d) for d in node.decorator_list]
    bases = [ast.unparse(base) for base in node.bases]
    return "msgspec.Struct" in bases or any(d.startswith("dataclass") for d in decorators)


def is_interface(node: ast.ClassDef) -> bool:
    """Abstract methods or not, a component implements it."""
    return not is_value(node) and "Protocol" not in [ast.unparse(base) for base in node.bases]


def grow(source: str) -> str:
    """Behind the last line of each class stands one that is new."""
    lines = source.splitlines()
    classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    for node in reversed(classes):
        assert node.end_lineno is not None
        if is_value(node):
            lines.insert(node.end_lineno, FIELD)
        elif is_interface(node):
            lines.insert(node.end_lineno, f"\n{METHOD}")
    return "\n".join(lines) + "\n"


def grown_engine(folder: Path) -> Path:
    """A copy of the package with grown interfaces -> the folder to import it from."""
    target = folder / "src" / "vllm_di"
    shutil.copytree(SOURCE, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    conf = SOURCE.parents[1] / "conf"
    if conf.is_dir():  # a checkout, not an installed package
        (folder / "conf").symlink_to(conf)
    for path in SOURCES:
        copy = target / path.relative_to(SOURCE)
        copy.write_text(grow(path.read_text(encoding="utf-8")), encoding="utf-8")
    return target.parent
