"""The Python blocks of pages about requests, run in order against a server with a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.served import served

from vllm_di import cli

DOCS = Path(__file__).parents[1] / "docs"
SETTINGS = ["model=tiny", "platform=cpu", "model.dtype=float32", "reasoning_parser=qwen3"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(SETTINGS) as address:
        yield f"{address}/v1"


PAGES = ["../README", "index", "structured-output", "tools", "reasoning"]
PAGES += ["messages-api", "responses-api"]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(page: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"URL": url, "MODEL": "tiny"}
    text = (DOCS / f"{page}.md").read_text()
    text = text.replace("http://127.0.0.1:8000", url.removesuffix("/v1"))
    blocks = re.findall(r"```python\n(.*?)```", text.replace('"smollm2"', '"tiny"'), re.DOTALL)
    assert blocks
    for block in blocks:
        before = len(capsys.readouterr().out)
        exec(compile(block, page, "exec"), names)
        assert len(capsys.readouterr().out) > before or "print(" not in block
    if "client" in names:
        names["client"].close()  # type: ignore[attr-defined]


def test_the_file_of_requests_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", (DOCS / "batch.md").read_text(), re.DOTALL)
    requests, out = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_text(block)
    settings = ["model=tiny", "platform=cpu", "model.dtype=float32"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run-batch", str(requests), "-o", str(out), *settings])
    assert ended.value.code == 0, capsys.readouterr().err
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert {one["custom_id"]: one["response"]["status_code"] for one in results} == {
        "1": 200,
        "2": 200,
    }
