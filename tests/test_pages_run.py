"""The Python blocks of pages about requests, run in order against a server with a tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.served import served

DOCS = Path(__file__).parents[1] / "docs"
SETTINGS = ["model=tiny", "platform=cpu", "model.dtype=float32", "reasoning_parser=qwen3"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(SETTINGS) as address:
        yield f"{address}/v1"


@pytest.mark.parametrize("page", ["structured-output.md", "tools.md", "reasoning.md"])
def test_the_blocks_run(page: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"URL": url, "MODEL": "tiny"}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        before = len(capsys.readouterr().out)
        exec(compile(block, page, "exec"), names)
        assert len(capsys.readouterr().out) > before or "print(" not in block
    if "client" in names:
        names["client"].close()  # type: ignore[attr-defined]
