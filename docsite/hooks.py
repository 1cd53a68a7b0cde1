"""What ``make docs`` does beside MkDocs: pages that are made at the build, links that leave
``docs/``, the picture of the assembly. ``mkdocs.yml`` names this file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docsite import links, reference
from vllm_di.containers.ports import conf_of_project
from vllm_di.containers.slots import slots
from vllm_di.containers.tree import ConfigFiles

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(__file__).parent / "assets"
PICTURE = "<!-- the assembly -->"
PROJECT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
STATUS = "status.md"
MATRIX = "docs/support-matrix.html"
FOLDERS = {"ports": "Platforms", "howto": "How to", "adr": "Decisions"}
"""Folder of ``docs/`` to the part of the navigation in which its pages stand."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: the groups of the reference, and pages that ``mkdocs.yml`` does not name."""
    nav: Any = config.nav
    tree = ConfigFiles([conf_of_project()])
    for title, groups in reference.sections(tree).items():
        _part(nav, "Reference").append({title: [{g: f"reference/{g}.md"} for g in groups]})
    docs = Path(config.docs_dir)
    named = set(_named(nav))
    for page in sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md")):
        if page not in named:
            _part(nav, FOLDERS.get(page.partition("/")[0], "More")).append(page)
    return config


def _part(nav: Any, title: str) -> list[Any]:
    """The entries below a title, wherever it stands; a new title comes last."""
    found = _find(nav, title)
    if found is None:
        nav.append({title: (found := [])})
    return found


def _find(nav: Any, title: str) -> list[Any] | None:
    for part in nav:
        for name, inner in part.items() if isinstance(part, dict) else ():
            if not isinstance(inner, list):
                continue
            found = inner if name == title else _find(inner, title)
            if found is not None:
                return found
    return None


def _named(nav: Any) -> Iterator[str]:
    """The pages that a navigation names."""
    for part in nav if isinstance(nav, list) else nav.values():
        if isinstance(part, str):
            yield part
        else:
            yield from _named(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here, and the files that pages link to."""
    made = dict(reference.pages())
    homes = {f"docs/{f.src_uri}": f.content_string for f in files.documentation_pages()}
    for name in PROJECT_PAGES:
        text = homes[name] = (ROOT / name).read_text(encoding="utf-8")
        made[links.PAGES[name]] = links.rewritten(text, name, links.PAGES[name])
    homes["README.md"] = status = _status()
    made[STATUS] = links.rewritten(status, "README.md", STATUS)
    targets = set().union(*(links.outside(text, home) for home, text in homes.items()))
    for target in links.with_folders(ROOT, targets):
        if target.endswith(".json"):
            files.append(_copied(config, target, ROOT / target))
        else:
            made[links.on_site(target)] = links.source_page(ROOT, target)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for asset in ASSETS.iterdir():
        files.append(_copied(config, f"assets/{asset.name}", asset))
    matrix = (ROOT / MATRIX).read_text(encoding="utf-8")  # mkdocs.yml excludes it under its name
    matrix = matrix.replace('href="../conformance/', 'href="conformance/')
    files.append(File.generated(config, links.on_site(MATRIX), content=matrix))
    return files


def _copied(config: MkDocsConfig, uri: str, path: Path) -> File:
    return File.generated(config, uri, abs_src_path=str(path))


def _status() -> str:
    """The parts of the README that say what works and how fast it is."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = text.index("\n## What works\n"), text.index("\n## More\n")
    return f"# What works, where, and how fast\n{text[begin:end]}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave ``docs/``, and the picture."""
    uri = page.file.src_uri
    if page.file.generated_by is None:
        markdown = links.rewritten(markdown, f"docs/{uri}", uri)
    return indented(markdown.replace(PICTURE, _assembly()))


def indented(markdown: str) -> str:
    """Code within a list, which GitHub takes behind six spaces, behind the eight that
    Python-Markdown wants."""
    lines: list[str] = []
    fenced = in_list = code = False
    before = ""
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if line.strip() and not line.startswith("    "):
            in_list = bool(re.match(r"(-|\d+\.|  ) ?\S", line))
        starts = not before.strip() and bool(re.match(r" {6,7}\S", line))
        code = in_list and not fenced and (starts or (code and line.startswith("      ")))
        lines.append(f"  {line}" if code else line)
        before = line
    return "\n".join(lines)


def _assembly() -> str:
    """A box for each process, with a link from each slot to its page."""
    texts = ("text, HTTP, no torch", "token ids, blocks", "tensors")
    boxes = []
    for text, (title, container) in zip(texts, reference.PROCESSES.items(), strict=True):
        names = " ".join(f"[{n}](reference/{n}.md){{ .slot }}" for n in slots(container))
        head = f"**{title}**{{ .title }}\n*{text}*"
        boxes.append(f'<div class="process" markdown>\n\n{head}\n\n{names}\n\n</div>')
    return '<div class="assembly" markdown>\n\n' + "\n\n".join(boxes) + "\n\n</div>"
