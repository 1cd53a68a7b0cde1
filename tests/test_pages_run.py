"""The Python blocks of pages about requests, run in order against a server with a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SETTINGS = ["model=tiny", "platform=cpu", "model.dtype=float32", "reasoning_parser=qwen3"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "vllm_di.cli", "serve", *SETTINGS, "server.port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert served.stderr is not None
            said: list[str] = []
            for line in served.stderr:
                said.append(line)
                if found := re.search(r"listening on (http://\S+)", line):
                    address = found[1]
                if line.startswith("INFO ready"):
                    break
            else:
                pytest.fail("".join(said))
            yield f"{address}/v1"
        finally:
            served.terminate()
            served.communicate()


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
