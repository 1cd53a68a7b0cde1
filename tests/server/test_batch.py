"""Files of requests: each line has its result, whatever the others are."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.server.fakes import EchoEngine, chat, completion, make_server

from vllm_di import cli
from vllm_di.server.batch import Batch

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id: Any, url: Any = TEXT, body: Any = None, **fields: Any) -> str:
    body = completion("ab", max_tokens=2) if body is None else body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | fields)


def results(text: str, concurrency: int = 4, **settings: Any) -> dict[Any, Any]:
    async def main() -> list[Any]:
        engine = EchoEngine(**settings.pop("engine", {}))
        server = make_server(engine, **settings)
        batch = Batch(server.app, server.batch_urls, concurrency=concurrency)
        found = [msgspec.to_builtins(r) async for r in batch.run(io.BytesIO(text.encode()))]
        assert not engine.live
        return found

    found = asyncio.run(main())
    assert len({one["id"] for one in found}) == len(found)
    assert all((one["response"] is None) != (one["error"] is None) for one in found)
    return {one["custom_id"]: one["response"] or one["error"] for one in found}


def test_each_endpoint_with_a_body() -> None:
    lines = [
        line("chat", CHAT, chat("hello", max_tokens=5)),
        line("text"),
        line("message", "/v1/messages", chat("hey", max_tokens=3)),
        line("count", "/v1/messages/count_tokens", chat("hey")),
        line("response", "/v1/responses", {"model": "echo", "input": "hi", "max_output_tokens": 2}),
        line("tokens", "/tokenize", {"prompt": "abc"}),
        line("words", "/detokenize", {"tokens": [104, 105]}),
    ]
    found = results("\n".join(lines) + "\n\n")
    assert {name: one["status_code"] for name, one in found.items()} == dict.fromkeys(found, 200)
    assert len(found) == len(lines)
    assert found["chat"]["body"]["choices"][0]["message"]["content"] == "hello"
    assert found["count"]["body"] == {"input_tokens": 3}
    assert found["words"]["body"] == {"prompt": "hi"}
    assert found["chat"]["request_id"].startswith("req-")


def test_a_wrong_line_stops_no_other() -> None:
    lines = [
        line("good"),
        "{not JSON",
        line("good"),
        line("refused", body=completion("ab", temperature=1000)),
        line("unknown", body=completion("ab", model="none")),
        line("url", "/v1/completion"),
        line("health", "/health"),
        line("stored", "/v1/responses/{id}/cancel", {}),
        line("get", method="GET"),
        line("stream", body=completion("ab", stream=True)),
        line("list", body=[1]),
        line("number", url=3),
        json.dumps({"custom_id": "bodiless", "url": TEXT}),
        line(None),
        line("last"),
    ]
    found = results("\n".join(lines))
    assert found["refused"]["status_code"] == found["list"]["status_code"] == 400
    assert found["refused"]["body"]["error"]["param"] == "temperature"
    assert found["unknown"]["status_code"] == 404
    assert "did you mean '/v1/completions'" in found["url"]["message"]
    for name in ("url", "health", "stored", "get"):
        assert found[name]["code"] == "invalid_url"
    assert found["stream"]["code"] == "invalid_request"
    assert found["number"]["code"] == found["bodiless"]["code"] == "invalid_line"
    assert found["number"]["message"].startswith("line 12: ")
    assert found["last"]["status_code"] == 200


def test_a_name_that_comes_twice() -> None:
    async def main() -> list[str | None]:
        server = make_server(EchoEngine())
        batch = Batch(server.app, server.batch_urls, concurrency=1)
        text = "\n".join([line("a"), line("b"), line("a")]).encode()
        return [r.error.code if r.error else None async for r in batch.run(io.BytesIO(text))]

    assert asyncio.run(main()) == [None, None, "duplicate_custom_id"]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_run_at_once(concurrency: int) -> None:
    most = 0

    class Counting(EchoEngine):
        async def generate(self, request: Any) -> Any:
            nonlocal most
            async for output in super().generate(request):
                most = max(most, len(self.live))
                yield output

    async def main() -> int:
        server = make_server(Counting(delay=0.001))
        batch = Batch(server.app, server.batch_urls, concurrency=concurrency)
        text = "\n".join(line(str(i)) for i in range(12)).encode()
        return len([result async for result in batch.run(io.BytesIO(text))])

    assert asyncio.run(main()) == 12
    assert most == concurrency


def test_what_a_full_queue_refuses_asks_again() -> None:
    lines = [line(str(i), body=completion("ab", max_tokens=2, n=3)) for i in range(5)]
    found = results("\n".join(lines), concurrency=5, max_queue=3, engine={"delay": 0.001})
    assert [one["status_code"] for one in found.values()] == [200] * 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys and addresses are of no interest: nothing listens."""
    body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True}
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    asked = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "structured_outputs": None,
        "max_tokens": 40,
        "temperature": 0,
    }
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join([line("a", body=body), line("b", CHAT, asked), line("c", "/x")]))
    out = tmp_path / "results.jsonl"
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    settings = ["platform=cpu", "model=tiny", "model.dtype=float32"]
    words = ["run-batch", str(requests), *settings, f"server.api_key_file={keys}", "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "server.host=0.0.0.0"])
    error = capsys.readouterr().err
    assert ended.value.code == 0, error
    assert "3 requests, 1 of them failed" in error
    found = {r["custom_id"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert found["a"]["response"]["body"]["usage"]["completion_tokens"] == 3
    assert found["b"]["response"]["body"]["choices"][0]["message"]["content"].startswith('{"a": 1')
    assert found["c"]["error"]["code"] == "invalid_url"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "one FILE of requests"),
        ([__file__, "-o", __file__], "would take the place of the requests"),
        (["nothing.jsonl"], "nothing.jsonl: the requests cannot be read"),
        (["nothing.jsonl", "--concurrency", "0"], "--concurrency: expected a number of 1"),
    ],
)
def test_what_cannot_run_is_said_at_once(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run-batch", *words])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
