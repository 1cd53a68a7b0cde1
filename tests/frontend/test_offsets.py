"""Offsets of tokens into their text, and texts through each kind of tokenizer and back."""

from __future__ import annotations

import functools
import tempfile
import weakref
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.frontend import sentencepiece, smollm2
from tests.models import vocabularies
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.frontend.detokenizer import Detokenizer
from vllm_di.frontend.offsets import TextOffsets, prompt_offsets
from vllm_di.frontend.outputs import token_string


def unigram(folder: Path) -> HfTokenizer:
    """T5's and Gemma's other kind: pieces with scores, byte tokens for the rest."""
    pieces = [("<unk>", 0.0), *((f"<0x{b:02X}>", -20.0) for b in range(256))]
    pieces += [(p, -float(i) / 2) for i, p in enumerate(vocabularies.PIECES, 1)]
    made = RustTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.save(str(folder / "tokenizer.json"))
    return HfTokenizer(path=str(folder))


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    holder = tempfile.TemporaryDirectory(prefix="tokenizer-")
    weakref.finalize(tokenizer, holder.cleanup)
    folder = Path(holder.name)
    match kind:
        case "bytes":
            return BytesTokenizer(vocab_size=300)
        case "byte-level":
            return HfTokenizer(path=smollm2.folder())
        case "sentencepiece":
            return HfTokenizer(path=sentencepiece.folder())
        case "unigram":
            return unigram(folder)
        case "gguf-sentencepiece":
            return vocabularies.tokenizer_of(vocabularies.sentencepiece(), folder)
        case "gguf-sentencepiece-bare":
            facts = vocabularies.sentencepiece(add_space_prefix=False)
            return vocabularies.tokenizer_of(facts, folder)
    assert kind == "gguf-byte-level"
    return vocabularies.tokenizer_of(vocabularies.byte_level(), folder)


KINDS = [
    "bytes",
    "byte-level",
    "sentencepiece",
    "unigram",
    "gguf-sentencepiece",
    "gguf-sentencepiece-bare",
    "gguf-byte-level",
]
LETTERS = st.sampled_from("  hiathe.é你好🦙👩\u200d\n\t1½\ufffd")
TEXTS = st.text(alphabet=st.one_of(LETTERS, st.characters(codec="utf-8")), max_size=40)


def readable(kind: str, text: str) -> bool:
    """Whether a kind can give the text back: SentencePiece takes ``▁`` for a space, and SmolLM2's
    vocabulary lacks bytes."""
    if kind == "byte-level":
        t = tokenizer(kind)
        return t.decode(t.encode(text, add_special_tokens=False)) == text
    if "sentencepiece" in kind or kind == "unigram":
        # what is matched whole gets a space behind it, as in llama.cpp
        return "▁" not in text and not (kind == "gguf-sentencepiece" and "\n\n" in text)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_of_a_text_is_the_text(kind: str) -> None:
    t = tokenizer(kind)

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        if not readable(kind, text):
            return
        ids = t.encode(text, add_special_tokens=False)
        stream = Detokenizer(t)
        assert "".join([*map(stream.add, ids), stream.flush()]) == t.decode(ids) == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_each_tokens_text_begins_at_its_offset(kind: str) -> None:
    t = tokenizer(kind)

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        if not readable(kind, text):
            return
        ids = t.encode(text, add_special_tokens=False)
        offsets = TextOffsets(t)
        found = [offsets.add(i) for i in ids]
        assert found == sorted(found)
        for position, (token_id, offset) in enumerate(zip(ids, found, strict=True)):
            part = token_string(t, token_id)
            if "\ufffd" in part:  # part of a character: of the one that begins there
                assert offset < len(text)
                continue
            if position == 0 and not text.startswith(part):
                part = part.removeprefix(" ")  # the space that stands before each text
            assert text[offset:].startswith(part)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_offsets_are_those_of_its_text(kind: str) -> None:
    t = tokenizer(kind)
    text = "the hi 🦙é. hi"
    for special in (False, True):
        ids = t.encode(text, add_special_tokens=special)
        offsets = prompt_offsets(t, ids, text)
        last = offsets[-1]
        assert text[last:].strip() in ("hi", "i")
        llama = {o for o, i in zip(offsets, ids, strict=True) if "\ufffd" in token_string(t, i)}
        assert llama <= {6, 7, 8}, "a llama, perhaps with the space before it, and an é"


def test_special_tokens_of_a_text_count_and_marks_before_it_do_not() -> None:
    t = tokenizer("gguf-byte-level")
    text = "hi<|end|>hi"
    ids = t.encode(text)
    assert prompt_offsets(t, ids, text) == [0, 2, 9]
    marked = tokenizer("gguf-sentencepiece")
    ids = marked.encode("hi 你好")
    assert [marked.token_text(i) for i in ids] == ["<s>", "▁hi", "▁", "你好"]
    assert prompt_offsets(marked, ids, "hi 你好") == [0, 0, 2, 3]


def test_each_character_of_a_run_of_bytes_has_its_own_offset() -> None:
    t = tokenizer("gguf-sentencepiece-bare")
    ids = t.encode("a🦙🦙a", add_special_tokens=False)
    offsets = TextOffsets(t)
    assert [offsets.add(i) for i in ids] == [0, *[1] * 4, *[2] * 4, 3]
