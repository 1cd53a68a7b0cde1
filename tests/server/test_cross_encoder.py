"""/v1/score and /v1/rerank of a server with a cross-encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.models.cross_encoders import CrossEncoder, make
from tests.server.served import served

DOCUMENTS = ["w7", "w1 w2 w3", "w4 w200", "w5 w6"]
QUERY = "w5 w6"


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[httpx.Client, CrossEncoder]]:
    folder = tmp_path_factory.mktemp("cross")
    it = make("Bert", folder)
    settings = [
        "model=local",
        f"model.path={folder}",
        "platform=cpu",
        "model.dtype=float32",
        "server.max_inputs=50",
    ]
    with served(settings) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client, it


def test_scores_and_rankings(server: tuple[httpx.Client, CrossEncoder]) -> None:
    client, it = server
    wanted = [float(it.logit(QUERY, text)[1].sigmoid()) for text in DOCUMENTS]
    body: dict[str, Any] = {"text_1": QUERY, "text_2": DOCUMENTS}
    found = client.post("/v1/score", json=body).json()
    assert [e["score"] for e in found["data"]] == pytest.approx(wanted, abs=1e-5)
    tokens = sum(len(it.logit(QUERY, text)[0]) for text in DOCUMENTS)
    assert found["usage"]["prompt_tokens"] == tokens
    body = {"query": QUERY, "documents": DOCUMENTS, "top_n": 3}
    results = client.post("/v1/rerank", json=body).json()["results"]
    order = sorted(range(4), key=lambda index: -wanted[index])[:3]
    assert [entry["index"] for entry in results] == order
    body = {"query": QUERY, "documents": ["w1 w2 w3"], "max_tokens_per_doc": 1}
    (cut,) = client.post("/v1/rerank", json=body).json()["results"]
    _, logit = it.logit(QUERY, "w1")
    assert cut["relevance_score"] == pytest.approx(float(logit.sigmoid()), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/embeddings", {"input": "w5"}, "model", "is a cross-encoder"),
        ("/v1/completions", {"prompt": "w5"}, "model", "generates no text"),
        ("/v1/score", {"text_1": [[5]], "text_2": [[6]]}, "text_2", "not token ids"),
        ("/v1/score", {"text_1": "w5", "text_2": "w6 " * 300}, "text_2", "a pair of texts"),
        ("/v1/rerank", {"query": "w6 " * 300, "documents": ["w5"]}, "documents", "a pair"),
        (
            "/v1/score",
            {"text_1": "w5", "text_2": "w6", "truncate_prompt_tokens": 2},
            "truncate_prompt_tokens",
            "no room",
        ),
        (
            "/v1/rerank",
            {"query": "w6 " * 500_000, "documents": ["w5"] * 50, "truncate_prompt_tokens": -1},
            "query",
            "1500000 characters with each of 50 texts",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_requests(
    path: str,
    body: dict[str, Any],
    param: str,
    words: str,
    server: tuple[httpx.Client, CrossEncoder],
) -> None:
    client, _ = server
    canary = {"text_1": "w5", "text_2": "w6"}
    before = client.post("/v1/score", json=canary).json()["data"]
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error
    assert client.post("/v1/score", json=canary).json()["data"] == before
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["pooling"]["kind"], model["pooling"]["token_types"]) == ("score", 2)
