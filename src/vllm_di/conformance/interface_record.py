"""The record of the interfaces: what each version declares, and what changed between two.

    python -m vllm_di.conformance.interface_record docs/interfaces

writes ``VERSION.json`` for the version that the sources carry, and ``changes.md`` from all records
in the folder. The sources are read as text: nothing is imported from them.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from vllm_di.components import interfaces, messages

SOURCES = (*sorted(Path(interfaces.__file__).parent.glob("*.py")), Path(messages.__file__))

Kind = Literal["class", "method", "attribute", "constant"]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One name of the interfaces."""

    kind: Kind
    form: str
    """Bases of a class, parameters and result of a method, type and default of the others."""
    required: bool = False
    """An abstract method, or a value without a default."""
    deprecated: str = ""
    """What replaces a deprecated name."""
    text: str = ""
    """Hash of its docstring, which holds the shapes, dtypes and units."""


class Record(msgspec.Struct, frozen=True):
    """One version."""

    version: str
    entries: dict[str, Entry]

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split("."))


class Change(msgspec.Struct, frozen=True):
    """One difference between two versions."""

    name: str
    what: Literal["added", "removed", "changed", "extended", "deprecated", "described differently"]
    detail: str
    breaks: bool
    """Whether a component written for the version before may fail."""


def record(sources: tuple[Path, ...] = SOURCES) -> Record:
    """What the sources declare now."""
    entries: dict[str, Entry] = {}
    for source in sources:
        entries |= dict(_entries(ast.parse(source.read_text(encoding="utf-8")).body, ""))
    version = entries.pop("INTERFACE_VERSION").form
    return Record(ast.literal_eval(version), dict(sorted(entries.items())))


def changes(old: Record, new: Record) -> list[Change]:
    """What a port's author has to know when going from ``old`` to ``new``, in name order."""
    found = []
    for name in sorted({*old.entries, *new.entries}):
        before, after = old.entries.get(name), new.entries.get(name)
        if before is None and after is not None:
            # of a new class nothing can be missing in what was written before
            fresh = name.rpartition(".")[0] not in old.entries
            found.append(Change(name, "added", after.form, after.required and not fresh))
        elif after is None and before is not None:
            found.append(Change(name, "removed", before.form, breaks=True))
        elif before is not None and after is not None and before != after:
            found.append(_difference(name, before, after))
    return found


def _difference(name: str, before: Entry, after: Entry) -> Change:
    if after.deprecated and not before.deprecated:
        return Change(name, "deprecated", after.deprecated, breaks=False)
    if (before.kind, before.form, before.required) == (after.kind, after.form, after.required):
        return Change(name, "described differently", after.form, breaks=False)
    detail = f"{before.form} → {after.form}"
    stricter = after.required and not before.required
    if _is_longer(before.form, after.form) and not stricter:
        return Change(name, "extended", detail, breaks=False)
    if before.form == after.form:
        detail = f"{after.form}: {'now required' if stricter else 'no longer required'}"
    return Change(name, "changed", detail, breaks=stricter or before.form != after.form)


def _is_longer(before: str, after: str) -> bool:
    """Whether a signature got optional parameters; a tuple, ``Literal`` or mapping more members."""
    old, new = (ast.parse(_as_code(form)).body[0] for form in (before, after))
    if isinstance(old, ast.FunctionDef) and isinstance(new, ast.FunctionDef):
        names, more = _parameters(old), _parameters(new)
        return (
            more[: len(names)] == names
            and all("=" in name for name in more[len(names) :])
            and before.rpartition(" -> ")[2] == after.rpartition(" -> ")[2]
        )
    end = before[-1:]
    return end in ")]}" and after.startswith(f"{before[:-1]}, ") and after.endswith(end)


def _as_code(form: str) -> str:
    return f"def f{form}: ..." if form.startswith("(self") else repr(form)


def _parameters(node: ast.FunctionDef) -> list[str]:
    """``name: type`` of each, ``name: type=default`` of an optional one."""
    given = [*node.args.posonlyargs, *node.args.args]
    defaults: list[ast.expr | None] = [None] * (len(given) - len(node.args.defaults))
    pairs = list(zip(given, [*defaults, *node.args.defaults], strict=True))
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return [ast.unparse(a) + (f"={ast.unparse(d)}" if d else "") for a, d in pairs]


def _entries(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Entry]]:
    """(dotted name, entry) of what a module or a class declares; private names are left out."""
    for statement, following in zip(body, [*body[1:], None], strict=True):
        text = _text_behind(following)
        if isinstance(statement, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in statement.bases)
            yield (
                statement.name,
                Entry("class", bases, text=_hashed(ast.get_docstring(statement))),
            )
            yield from _entries(statement.body, f"{statement.name}.")
        elif isinstance(statement, ast.FunctionDef) and not statement.name.startswith("_"):
            if prefix:  # functions of the module are helpers
                yield f"{prefix}{statement.name}", _method(statement)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            form = ast.unparse(statement.annotation)
            if statement.value is not None:
                form = f"{form} = {ast.unparse(statement.value)}"
            name, required = statement.target.id, statement.value is None
            yield f"{prefix}{name}", Entry("attribute", form, required, text=text)
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if not name.startswith("_"):
                yield f"{prefix}{name}", Entry("constant", ast.unparse(statement.value), text=text)


def _method(node: ast.FunctionDef) -> Entry:
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
    texts = [ast.literal_eval(d.args[0]) for d in calls if ast.unparse(d.func) == "deprecated"]
    decorators = {ast.unparse(d) for d in node.decorator_list if d not in calls}
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    form = f"({ast.unparse(node.args)}){result}"
    kinds = sorted(decorators - {"abstractmethod"})
    form = " ".join([*(f"@{kind}" for kind in kinds), form])
    return Entry(
        "method",
        form,
        required="abstractmethod" in decorators,
        deprecated="".join(texts),
        text=_hashed(ast.get_docstring(node)),
    )


def _text_behind(statement: ast.stmt | None) -> str:
    """The hash of the string that stands behind an attribute as its text."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        value = statement.value.value
        return _hashed(value) if isinstance(value, str) else ""
    return ""


def _hashed(text: str | None) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12] if text else ""


# -- the folder of records ---------------------------------------------------------------------


def read(folder: Path) -> list[Record]:
    """All recorded versions, oldest first."""
    found = [msgspec.json.decode(p.read_bytes(), type=Record) for p in folder.glob("*.json")]
    return sorted(found, key=lambda item: item.order)


def changelog(records: list[Record]) -> str:
    """Markdown: each version with what is new in it, newest first."""
    lines = [
        "# Changes of the interfaces",
        "",
        "Generated by `make interfaces` from the records in this folder; the policy is in",
        "[interface versions](../interface-versions.md).",
    ]
    for old, new in reversed(list(itertools.pairwise(records))):
        lines += ["", f"## {new.version}", "", f"Beside {old.version}:", ""]
        for change in changes(old, new):
            mark = " **(breaks)**" if change.breaks else ""
            lines.append(f"- {change.what}: `{change.name}`{mark} `{change.detail}`")
    if records:
        lines += ["", f"## {records[0].version}", "", "The first recorded version.", ""]
    return "\n".join(lines)


def encoded(item: Record) -> bytes:
    return msgspec.json.format(msgspec.json.encode(item), indent=1) + b"\n"


def main(folder: Path) -> None:
    """Write the record of the current sources, and the changelog of all."""
    folder.mkdir(parents=True, exist_ok=True)
    now = record()
    (folder / f"{now.version}.json").write_bytes(encoded(now))
    (folder / "changes.md").write_text(changelog(read(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
