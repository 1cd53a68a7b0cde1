"""The byte-level stand-in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_di.components.tokenizer.bytes import BytesTokenizer

T = BytesTokenizer(vocab_size=300)


@given(st.text())
def test_there_and_back(text: str) -> None:
    assert T.decode(T.encode(text)) == text
    assert b"".join(map(T.token_bytes, T.encode(text, add_special_tokens=False))) == text.encode()


def test_marks_and_placeholders() -> None:
    assert T.encode("a") == [256, 97]
    assert T.decode([256, 97, 299, 257]) == "a⟨299⟩"
    assert T.decode([256, 97, 257], skip_special_tokens=False) == "<s>a</s>"
    assert [T.is_special(i) for i in (255, 256, 257, 258)] == [False, True, True, False]
    assert T.token_text(10) == "\\x0a"
    assert all(T.token_text(i) and T.token_text(i).isprintable() for i in range(300))


def test_small_vocabularies() -> None:
    small = BytesTokenizer(vocab_size=256)
    assert (small.bos_token, small.eos_token_id) == (None, None)
    assert small.encode("a") == [97]
    assert BytesTokenizer(vocab_size=None).vocab_size == 258


def test_it_says_that_it_is_a_stand_in(caplog: pytest.LogCaptureFixture) -> None:
    BytesTokenizer(vocab_size=300)
    assert "stand-in" in caplog.text
