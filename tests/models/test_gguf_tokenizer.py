"""Vocabularies of GGUF files: the ids are llama.cpp's, what cannot be so is refused by name.
``make test-vocabularies`` compares with llama.cpp's own cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.vocabularies import byte_level, pieces_of, sentencepiece, tokenizer_of

from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.gguf_pretokenizers import PRE_TOKENIZERS
from vllm_di.models.gguf_tokenizer import build_tokenizer, tokenizer_config

TEXT = "naïve  the hi 123 12345 y'all I'LL\r\n\n  x 你好、世界。🦙 ½ é."


def tokens(tokenizer: HfTokenizer, text: str) -> list[str]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.token_text(i) for i in ids]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("hi", ["▁hi"]),
        (" hi", ["▁", "▁hi"]),  # as it stands, the space before each text apart
        ("  hi", ["▁▁", "▁hi"]),
        (" ", ["▁▁"]),
        ("", []),
        ("é好", ["▁", "é", "好"]),
        ("🦙", ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]),
        ("hi<tool>hi", ["▁hi", "<tool>", "▁hi"]),
        ("<tool>  hi", ["<tool>", "▁▁", "▁hi"]),
        ("</s> hi", ["</s>", "▁", "▁hi"]),
        ("hi\n\nhi", ["▁hi", "\n\n", "▁hi"]),
        ("▁hi", ["▁", "▁hi"]),
        ("<0x41>", ["▁", "<0x3C>", "<0x30>", "<0x78>", "<0x34>", "<0x31>", "<0x3E>"]),
    ],
)
def test_sentencepiece_texts(text: str, want: list[str], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(sentencepiece(), tmp_path)
    assert tokens(tokenizer, text) == want
    ids = tokenizer.encode(text)
    assert ids[0] == 1, "a text begins with <s> unless the file says otherwise"
    if "<tool>" not in text and "\n\n" not in text and "</s>" not in text:
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_without_a_space_before_texts(tmp_path: Path) -> None:
    facts = sentencepiece(add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    tokenizer = tokenizer_of(facts, tmp_path)
    assert tokens(tokenizer, "hi hi") == ["hi", "▁hi"]
    assert tokens(tokenizer, " hi") == ["▁hi"]
    assert tokenizer.decode(tokenizer.encode(" hi")) == " hi"
    assert tokenizer.encode("hi")[-1] == 2
    assert tokenizer.encode("hi")[0] != 1


def test_merges_follow_the_scores_as_sentencepiece_does(tmp_path: Path) -> None:
    facts = sentencepiece()
    tokenizer = tokenizer_of(facts, tmp_path)

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet=" ahite.é你好\nx", max_size=40))
    def check(text: str) -> None:
        if "\n\n" not in text and text:
            assert tokenizer.encode(text, add_special_tokens=False) == pieces_of(text, facts)

    check()


def test_phi3s_tokens_take_the_spaces_behind_them(tmp_path: Path) -> None:
    facts = sentencepiece() | {"general.name": "Phi-3 mini"}
    tokenizer = tokenizer_of(facts, tmp_path)
    assert tokens(tokenizer, "<tool>  hi") == ["<tool>", "▁hi"]
    assert tokens(tokenizer, "<s> hi") == ["<s>", "▁", "▁hi"]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_way_to_cut_text_keeps_it(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(byte_level(pre=name), tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("qwen2", "123", ["1", "2", "3"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("smollm", "123", ["1", "2", "3"]),
        ("gpt-2", "1234", ["123", "4"]),
        ("falcon", "12312", ["123", "12"]),
        ("default", "12312", ["123", "12"]),
        ("qwen2", "hi<tool>  hi<|end|>", ["hi", "<tool>", "Ġ", "Ġhi", "<|end|>"]),
    ],
)
def test_byte_level_texts(name: str, text: str, want: list[str], tmp_path: Path) -> None:
    assert tokens(tokenizer_of(byte_level(pre=name), tmp_path), text) == want


def test_llama3_begins_texts_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    mark = byte_level()["tokenizer.ggml.eos_token_id"]
    first = tokenizer_of(byte_level(pre="llama-bpe", bos_token_id=mark), tmp_path / "a")
    assert first.encode("hi")[0] == mark
    second = byte_level(pre="llama-bpe", bos_token_id=mark, add_bos_token=False)
    assert tokenizer_of(second, tmp_path / "b").encode("hi")[0] != mark


def test_names_of_tokens_and_templates_are_kept() -> None:
    facts = sentencepiece(padding_token_id=2) | {"tokenizer.chat_template": "T"}
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    assert tokenizer_config(facts) == marks | {"chat_template": "T"}
    several = facts | {"tokenizer.chat_template.rag": "R"}
    named = {
        entry["name"]: entry["template"] for entry in tokenizer_config(several)["chat_template"]
    }
    assert named == {"default": "T", "rag": "R"}


def test_empty_tokens_and_repeated_unused_ones_have_names_of_their_own() -> None:
    facts = sentencepiece()
    facts["tokenizer.ggml.tokens"] += ["", "", "<s>"]
    facts["tokenizer.ggml.scores"] += [-2000.0] * 3
    facts["tokenizer.ggml.token_type"] += [1, 1, 3]
    count = len(facts["tokenizer.ggml.tokens"])
    assert build_tokenizer(facts).get_vocab_size() == count


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (sentencepiece(model="bert"), UnsupportedModelError, "tokenizer.ggml.model 'bert'"),
    (sentencepiece(model="t5"), UnsupportedModelError, "tokenizer.ggml.model 't5'"),
    (sentencepiece(model="gemma4"), UnsupportedModelError, "tokenizer.ggml.model 'gemma4'"),
    (sentencepiece(remove_extra_whitespaces=True), UnsupportedModelError, "remove_extra_white"),
    (sentencepiece(precompiled_charsmap=[1, 2]), UnsupportedModelError, "precompiled_charsmap"),
    (sentencepiece(scores=[0.0]), CheckpointError, "scores"),
    (sentencepiece(tokens=[]), CheckpointError, "tokens is missing"),
    (sentencepiece(token_type=[1]), CheckpointError, "token_type has 1 entries"),
    (sentencepiece(unknown_token_id=99999), CheckpointError, "unk token is 99999"),
    (sentencepiece(bos_token_id="x"), CheckpointError, "bos token is 'x'"),
    (byte_level(pre="afmoe"), UnsupportedModelError, "tokenizer.ggml.pre 'afmoe'"),
    (byte_level(pre="qwen"), UnsupportedModelError, "did you mean 'qwen2'"),
    (byte_level(pre=None), UnsupportedModelError, "tokenizer.ggml.pre is missing"),
    (byte_level(merges=None), CheckpointError, "merges is missing"),
    (byte_level(add_bos_token=True), CheckpointError, "add_bos_token is set without"),
    (byte_level(bos_token_id=3, add_bos_token=True), UnsupportedModelError, r"'\$' cannot stand"),
    (byte_level(add_space_prefix=True), UnsupportedModelError, "add_space_prefix"),
]


@pytest.mark.parametrize(("facts", "kind", "match"), REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(
    facts: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        build_tokenizer(facts)


def test_a_piece_of_letters_that_are_no_tokens_is_refused() -> None:
    facts = sentencepiece()
    facts["tokenizer.ggml.tokens"].append("▁ж")
    facts["tokenizer.ggml.scores"].append(-99.0)
    facts["tokenizer.ggml.token_type"].append(1)
    with pytest.raises(UnsupportedModelError, match="no token 'ж' to make it of"):
        build_tokenizer(facts)


def test_a_text_that_is_there_twice_is_refused() -> None:
    facts = sentencepiece()
    facts["tokenizer.ggml.tokens"].append("hi")
    facts["tokenizer.ggml.scores"].append(-99.0)
    facts["tokenizer.ggml.token_type"].append(1)
    with pytest.raises(CheckpointError, match="'hi' is there twice"):
        build_tokenizer(facts)
