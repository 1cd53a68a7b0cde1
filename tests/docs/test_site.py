"""The site: built without a warning, whole without a network, searchable in a browser.
``make test-docs``; what needs no MkDocs is in ``test_links.py``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``make docs`` makes it, in a folder without a way out: a proxy that nobody listens at."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class References(HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        if "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") != "canonical":
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


def test_nothing_is_loaded_from_elsewhere_and_no_link_is_broken(site: Path) -> None:
    pages = {path: References(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 90
    for path, page in pages.items():
        for target in page.loads + page.links:
            parts = urlsplit(target)
            if parts.scheme or target.startswith("//"):
                assert target in page.links, f"{path.name} loads {target}"
                continue
            if path.name == "404.html":  # its links are from the root
                continue
            found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert found.exists(), f"{path.relative_to(site)} links to {target}"
            if parts.fragment and found in pages:
                assert unquote(parts.fragment) in pages[found].ids, f"{path.name}: {target}"
    for path in [*site.rglob("*.css")]:
        assert not re.search(r"url\([\"']?https?:", path.read_text()), path.name


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    for name in (
        "support-matrix.svg",
        "support-matrix-table.html",
        "peers.png",
        "contributing.html",
    ):
        assert (site / name).is_file(), name
    assert "{ #" not in (site / "reference/attention.html").read_text()
    for key in ("attention.tokens_per_split", "server.max_queue"):
        index = json.loads((site / "search/search_index.json").read_text())
        assert any(key in each["text"] for each in index["docs"]), key


def test_code_in_lists_stays_code(site: Path) -> None:
    text = (site / "interface-versions.html").read_text()
    assert re.search(r"<code>…/conf/platform/mychip.yaml:10", text)


def test_the_target_and_the_extra_are_those_of_the_test() -> None:
    """``make docs`` runs what this file runs, with ``strict`` from mkdocs.yml."""
    assert "-m mkdocs build" in (ROOT / "Makefile").read_text()
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["strict"] is True
