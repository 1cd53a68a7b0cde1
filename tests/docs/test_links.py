"""Links of the pages as they are on the site."""

from __future__ import annotations

from pathlib import Path

import pytest
from docsite.links import on_site, outside, rewritten, source_page, with_folders

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "home", "page", "there"),
    [
        ("[x](docs/vllm.md#a)", "README.md", "status.md", "[x](vllm.md#a)"),
        ("[x](CONTRIBUTING.md)", "README.md", "index.md", "[x](contributing.md)"),
        ("[x](../CONTRIBUTING.md)", "docs/index.md", "index.md", "[x](contributing.md)"),
        ("[x](cuda.md)", "docs/ports/xpu.md", "ports/xpu.md", "[x](cuda.md)"),
        ("[x](../../README.md)", "docs/ports/xpu.md", "ports/xpu.md", "[x](../index.md)"),
        (
            "[x](../../tests/a.py)",
            "docs/ports/xpu.md",
            "ports/xpu.md",
            "[x](../source/tests/a.py.md)",
        ),
        (
            "[x](../../conformance/reports/cpu.json)",
            "docs/ports/xpu.md",
            "ports/xpu.md",
            "[x](../conformance/reports/cpu.json)",
        ),
        ("[x](https://example.org/a)", "README.md", "status.md", "[x](https://example.org/a)"),
        ("[x](#here)", "README.md", "status.md", "[x](#here)"),
    ],
)
def test_a_link(text: str, home: str, page: str, there: str) -> None:
    assert rewritten(text, home, page) == there


def test_what_lies_outside_becomes_a_page() -> None:
    folder = "src/vllm_di/components/interfaces"
    text = f"[a](../{folder}/) [b](vllm.md) [c](../LICENSE) [d](../README.md)"
    targets = outside(text, "docs/vendors.md")
    assert targets == {folder, "LICENSE"}
    assert f"{folder}/ops.py" in with_folders(ROOT, targets)
    assert "(./interfaces/ops.py.md)" in source_page(ROOT, folder)
    assert on_site(folder) == f"source/{folder}.md"
    assert source_page(ROOT, "LICENSE").startswith("# LICENSE\n\n````text\n")
