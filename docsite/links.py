"""Links of the pages to what lies outside ``docs/``: each becomes a link to a page of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)((?:#[^)]*)?\))")
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "source/LICENSE.md",
}
"""File of the project to its page; any other file has one below ``source/``."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".h": "cpp", ".cpp": "cpp"}


def rewritten(text: str, home: str, page: str) -> str:
    """Markdown with its links as they are from a page of the site.

    ``home`` is the path of the text's file below the root of the project (``docs/ports/xpu.md``),
    ``page`` that of its page below ``docs/``.
    """

    def link(found: re.Match[str]) -> str:
        target = on_site(posixpath.normpath(posixpath.join(posixpath.dirname(home), found[2])))
        return found[1] + posixpath.relpath(target, posixpath.dirname(page) or ".") + found[3]

    return LINK.sub(link, text)


def on_site(target: str) -> str:
    """The page, or file of the site, for a path below the root of the project."""
    if target == "docs/support-matrix.html":
        return "support-matrix-table.html"  # the page of its name is made of the Markdown
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return PAGES.get(target) or (target if target.endswith(".json") else f"source/{target}.md")


def outside(text: str, home: str) -> set[str]:
    """The files and folders outside ``docs/`` that a text links to, below the root."""
    folder = posixpath.dirname(home)
    targets = {
        posixpath.normpath(posixpath.join(folder, found[2])) for found in LINK.finditer(text)
    }
    return {t for t in targets if not t.startswith("docs/") and t not in PAGES} | (
        {"LICENSE"} & targets
    )


def source_page(root: Path, target: str) -> str:
    """Markdown that shows a file of the project, or lists a folder."""
    path = root / target
    if path.is_dir():
        rows = [f"- [{file.name}](./{path.name}/{file.name}.md)" for file in _sources(path)]
        return "\n".join([f"# {target}", "", *rows, ""])
    text = path.read_text(encoding="utf-8").rstrip("\n")
    return f"# {target}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"


def with_folders(root: Path, targets: set[str]) -> set[str]:
    """And the files that the pages of folders list."""
    files = [f for t in targets if (root / t).is_dir() for f in _sources(root / t)]
    return targets | {str(file.relative_to(root)) for file in files}


def _sources(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in LANGUAGES)
