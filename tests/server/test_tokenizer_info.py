"""``/tokenizer_info``: only where it is asked for, and nothing that names files."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from tests.server.fakes import TEMPLATE, EchoEngine, with_client

from vllm_di.components.tokenizer.hf import HfTokenizer

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": {"content": "<s>", "lstrip": False},
    "pad_token": "<pad>",
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
    "model_max_length": 1000000000000000019884624838656,
    "tokenizer_file": "/home/someone/tokenizer.json",
    "name_or_path": "/home/someone",
    "chat_template": "{{ messages }}",
    "clean_up_tokenization_spaces": False,
}


def test_off_by_default() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        assert (await client.get("/tokenizer_info")).status_code == 404
        assert "/tokenizer_info" not in (await client.get("/openapi.json")).json()["paths"]

    with_client(test)


def test_what_it_says() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        assert (await client.get("/tokenizer_info")).json() == {
            "tokenizer_class": "BytesTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "eos_token_id": 257,
            "pad_token": None,
            "vocab_size": 300,
            "model_max_length": 256,
            "chat_template": TEMPLATE,
        }
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert "503" in paths["/tokenizer_info"]["get"]["responses"]

    with_client(test, tokenizer_info=True)


def test_settings_of_a_checkpoint(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    info = HfTokenizer(path=str(tmp_path)).info()
    assert info == {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "added_tokens_decoder": {"0": "<s>"},
        "model_max_length": 1e30,
        "clean_up_tokenization_spaces": False,
    }
