"""/v1/score and /v1/rerank of a whole server: they are the cosines of its own embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from tests.server.served import served

from vllm_di.frontend.scoring import cosine
from vllm_di.server import answers

SETTINGS = ["model=tiny", "platform=cpu", "model.dtype=float32", "pooler=mean"]
SETTINGS += ["server.max_inputs=50", "model.max_model_len=128"]
DOCUMENTS = ["zzz", "hello", "hello world", "help"]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with served(SETTINGS) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    kind = answers.Ranking if "rerank" in path else answers.Scores
    msgspec.json.decode(response.content, type=kind)
    found: dict[str, Any] = response.json()
    return found


def cosines(client: httpx.Client, one: str, others: list[str]) -> list[float]:
    data = post_embeddings(client, [one, *others])
    return [cosine(data[0], vector) for vector in data[1:]]


def post_embeddings(client: httpx.Client, texts: list[str]) -> list[list[float]]:
    response = client.post("/v1/embeddings", json={"input": texts})
    return [entry["embedding"] for entry in response.json()["data"]]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores(path: str, client: httpx.Client) -> None:
    wanted = cosines(client, "hello", DOCUMENTS)
    found = post(client, path, model="tiny", text_1="hello", text_2=DOCUMENTS)
    assert [entry["score"] for entry in found["data"]] == pytest.approx(wanted, abs=1e-6)
    assert found["usage"]["prompt_tokens"] == sum(len(t) + 1 for t in ["hello", *DOCUMENTS])
    pairs = post(client, path, text_1=DOCUMENTS, text_2=DOCUMENTS)
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx([1.0] * 4, abs=1e-5)
    single = post(client, path, text_1="hello", text_2="zzz")
    assert single["data"][0]["score"] == pytest.approx(wanted[0], abs=1e-6)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_a_ranking(path: str, client: httpx.Client) -> None:
    wanted = cosines(client, "hello", DOCUMENTS)
    found = post(client, path, query="hello", documents=DOCUMENTS)["results"]
    order = sorted(range(4), key=lambda index: -wanted[index])
    assert [entry["index"] for entry in found] == order
    assert found[0]["document"] == {"text": "hello"}
    scores = [entry["relevance_score"] for entry in found]
    assert scores == pytest.approx([wanted[i] for i in order], abs=1e-6)
    given = [{"text": text} for text in DOCUMENTS]
    top = post(client, path, query="hello", documents=given, top_n=2, return_documents=False)
    assert [entry["index"] for entry in top["results"]] == order[:2]
    assert "document" not in top["results"][0]
    cut = post(client, path, query="he", documents=["hello"], max_tokens_per_doc=3)
    assert cut["results"][0]["relevance_score"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["a"] * 51}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "x" * 500}, "text_2"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 100_000}, "documents"),
        ("/v1/rerank", {"query": "x" * 500, "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["x" * 500]}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["a"], "max_tokens_per_doc": 0},
            "max_tokens_per_doc",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_requests(path: str, body: dict[str, Any], param: str, client: httpx.Client) -> None:
    before = post_embeddings(client, ["canary"])
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert post_embeddings(client, ["canary"]) == before
