"""Tokenizers of the Hugging Face layout: byte-level (SmolLM2) and SentencePiece-like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.frontend import sentencepiece, smollm2

from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.errors import CheckpointError, RequestError


@pytest.fixture(scope="module")
def smol() -> HfTokenizer:
    return HfTokenizer(path=smollm2.folder())


@pytest.fixture(scope="module")
def piece() -> HfTokenizer:
    return HfTokenizer(path=sentencepiece.folder())


def test_names_and_sizes(smol: HfTokenizer, piece: HfTokenizer) -> None:
    assert (smol.bos_token, smol.eos_token, smol.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert smol.vocab_size == 49152
    assert (piece.bos_token, piece.eos_token_id) == ("<s>", 2)


def test_there_and_back(smol: HfTokenizer, piece: HfTokenizer) -> None:
    text = "The capital of France is Paris. 123 你好"
    assert smol.decode(smol.encode(text)) == text
    assert piece.decode(piece.encode(text)) == text
    assert piece.encode("x")[0] == 1, "the template of the tokenizer puts <s> first"
    assert piece.encode("x", add_special_tokens=False)[0] != 1


def test_special_tokens(smol: HfTokenizer) -> None:
    ids = smol.encode("<|im_start|>hi<|im_end|>")
    assert [smol.is_special(i) for i in ids] == [True, False, True]
    assert smol.decode(ids) == "hi"
    assert smol.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize("text", ["hello world", "naïve 你好 🙂", "\n\t  "])
def test_bytes_of_tokens_add_up(smol: HfTokenizer, piece: HfTokenizer, text: str) -> None:
    assert b"".join(map(smol.token_bytes, smol.encode(text))) == text.encode()
    ids = piece.encode(text, add_special_tokens=False)
    assert b"".join(map(piece.token_bytes, ids)) == b" " + text.encode()
    assert smol.token_text(smol.encode(" world")[0]) == "Ġworld"


def test_ids_outside_the_vocabulary(smol: HfTokenizer) -> None:
    assert smol.decode([10**6]) == ""
    assert smol.token_text(10**6) == ""
    assert smol.token_bytes(10**6) == b""


def test_lone_surrogates_are_refused(smol: HfTokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        smol.encode("a\ud800b")


def test_a_saved_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    shutil.copytree(sentencepiece.folder(), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    strategy = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps({**data, "truncation": strategy}))
    assert len(HfTokenizer(path=str(tmp_path)).encode("abcdefghijkl")) > 4


def test_missing_and_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.path.*tokenizer=bytes"):
        HfTokenizer(path=None)
    with pytest.raises(CheckpointError, match=r"nowhere.*tokenizer\.json"):
        HfTokenizer(path=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"there is no .*tokenizer\.json"):
        HfTokenizer(path=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        HfTokenizer(path=str(tmp_path))
    shutil.copy(Path(sentencepiece.folder()) / "tokenizer.json", tmp_path)
    assert HfTokenizer(path=str(tmp_path)).eos_token is None, "the config file is optional"
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is damaged"):
        HfTokenizer(path=str(tmp_path))
