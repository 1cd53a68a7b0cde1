"""llama.cpp's own vocabularies with their texts and ids: ``make test-vocabularies``."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader
from tests.models.vocabularies import tokenizer_of
from tests.vendored import LLAMA_CPP

from vllm_di.errors import UnsupportedModelError
from vllm_di.frontend.detokenizer import Detokenizer
from vllm_di.models.gguf_tokenizer import build_tokenizer

pytestmark = pytest.mark.vocabularies

SEPARATOR = "\n__ggml_vocab_test__\n"
WITH_CASES = [
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
]
WITHOUT_CASES = ["baichuan"]
REFUSED = {
    "aquila": "tokenizer.ggml.pre is missing",
    "bert-bge": "tokenizer.ggml.model 'bert'",
    "gemma-4": "tokenizer.ggml.model 'gemma4'",
    "gpt-neox": "tokenizer.ggml.pre is missing",
    "nomic-bert-moe": "tokenizer.ggml.remove_extra_whitespaces",
}


def file_of(name: str) -> Path:
    return LLAMA_CPP.folder() / f"ggml-vocab-{name}.gguf"


def facts_of(name: str) -> dict[str, object]:
    return {key: field.contents() for key, field in GGUFReader(file_of(name)).fields.items()}


def cases_of(name: str) -> list[tuple[str, list[int]]]:
    file = file_of(name)
    texts = file.with_name(f"{file.name}.inp").read_text("utf-8").split(SEPARATOR)
    lines = file.with_name(f"{file.name}.out").read_text("utf-8").split("\n")
    return [(t, [*map(int, line.split())]) for t, line in zip(texts, lines, strict=True)]


def test_every_vocabulary_is_here() -> None:
    files = {file.name for file in LLAMA_CPP.folder().glob("ggml-vocab-*.gguf")}
    named = {file_of(name).name for name in (*WITH_CASES, *WITHOUT_CASES, *REFUSED)}
    assert files == named
    cased = {file.name.removesuffix(".inp") for file in LLAMA_CPP.folder().glob("*.gguf.inp")}
    assert {file_of(name).name for name in WITH_CASES} == cased - {
        file_of(name).name for name in REFUSED
    }


@pytest.mark.parametrize("name", [*WITH_CASES, *WITHOUT_CASES])
def test_ids_and_texts(name: str, tmp_path: Path) -> None:
    """The ids are llama.cpp's, and the stream of their text is the text."""
    tokenizer = tokenizer_of(facts_of(name), tmp_path)
    own = name in WITH_CASES
    cases = cases_of(name if own else "llama-spm")
    assert len(cases) > 40
    wrong = []
    for text, want in cases:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if own and ids != want:
            wrong.append((text, ids, want))
        stream = Detokenizer(tokenizer)
        pieces = [*map(stream.add, ids), stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not wrong, f"{len(wrong)} of {len(cases)}, the first: {wrong[0]}"


@pytest.mark.parametrize(("name", "match"), REFUSED.items())
def test_a_vocabulary_that_is_not_known_is_refused_by_name(name: str, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        build_tokenizer(facts_of(name))
