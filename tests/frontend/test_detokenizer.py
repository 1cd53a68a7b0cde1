"""The stream of settled pieces is the whole text, and never shows what a later token changes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.frontend import sentencepiece, smollm2

from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.frontend.detokenizer import Detokenizer, StopStrings

TEXT = "naïve café 你好、世界。 🙂👩‍👩‍👧‍👦 한국어 ½ \ufffd\ufffd end\n\n  x"


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    if name == "bytes":
        return BytesTokenizer(vocab_size=300)
    return HfTokenizer(path=smollm2.folder() if name == "smollm2" else sentencepiece.folder())


NAMES = ("smollm2", "bytes", "sentencepiece")


def stream(t: Tokenizer, ids: Sequence[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(t, skip_special_tokens=skip)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


def hostile_ids(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids, many of them parts of characters."""
    t = tokenizer(name)
    any_id = st.integers(0, t.vocab_size - 1)
    parts = [i for i in range(min(t.vocab_size, 3000)) if t.token_bytes(i)[:1] >= b"\x80"]
    real = st.text(max_size=8).map(lambda s: t.encode(s, add_special_tokens=False))
    piece = st.one_of(any_id.map(lambda i: [i]), st.sampled_from(parts).map(lambda i: [i]), real)
    return st.lists(piece, max_size=25).map(lambda lists: [i for part in lists for i in part])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_stream_equals_whole_decode_for_any_ids(name: str, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(hostile_ids(name))
    whole = tokenizer(name).decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer(name), ids, skip=skip)) == whole


def test_byte_level_text_is_made_without_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [tokenizer(name).is_byte_level for name in NAMES] == [True, False, False]
    t = tokenizer("smollm2")
    ids = t.encode(TEXT, add_special_tokens=False)
    monkeypatch.setattr(HfTokenizer, "decode", None)
    assert "".join(stream(t, ids)) == TEXT


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1))
def test_no_piece_of_real_text_is_broken(name: str, text: str) -> None:
    ids = tokenizer(name).encode(text, add_special_tokens=False)
    whole = tokenizer(name).decode(ids)
    assume("\ufffd" not in whole)  # SmolLM2's vocabulary lacks a few bytes
    pieces = stream(tokenizer(name), ids)
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_scripts_and_emoji(name: str) -> None:
    ids = tokenizer(name).encode(TEXT, add_special_tokens=False)
    pieces = stream(tokenizer(name), ids)
    assert "".join(pieces) == tokenizer(name).decode(ids) == TEXT
    assert sum(map(bool, pieces)) > 10, "it must stream, not wait for the end"


@pytest.mark.parametrize("name", NAMES)
def test_continues_a_prompt_as_if_decoded_together(name: str) -> None:
    t = tokenizer(name)
    ids = t.encode("The capital of France is Paris", add_special_tokens=False)
    detokenizer = Detokenizer(t, ids[:-3])
    text = "".join(detokenizer.add(i) for i in ids[-3:]) + detokenizer.flush()
    assert t.decode(ids) == t.decode(ids[:-3]) + text


def test_a_prompt_that_ends_inside_a_character_gives_no_context() -> None:
    t = tokenizer("bytes")
    ids = list("é".encode())
    detokenizer = Detokenizer(t, ids[:1])
    assert detokenizer.add(ids[1]) + detokenizer.flush() == t.decode(ids[1:])


class CountingTokenizer(BytesTokenizer):
    longest = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(token_ids))
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    "ids", [[0x80] * 500, [0xE2] * 500, [*"a😀".encode()] * 200, [257] * 500, [0xF0, 0x9F] * 300]
)
def test_cost_of_a_token_does_not_grow_with_the_text(ids: list[int]) -> None:
    t = CountingTokenizer(vocab_size=300)
    stream(t, ids)
    assert t.longest <= 8


# Stop strings


def search(
    stops: Sequence[str], pieces: Sequence[str], *, include: bool = False
) -> tuple[str, str | None]:
    checker = StopStrings(stops, include=include)
    shown = ""
    for piece in pieces:
        text, stop = checker.add(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + checker.flush(), None


def reference(stops: Sequence[str], text: str, *, include: bool) -> tuple[str, str | None]:
    """The first stop string to be complete, the first in the list on a tie."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.text("abc", max_size=6), max_size=12),
    include=st.booleans(),
)
def test_stop_strings_cut_the_same_text_however_it_is_split(
    stops: list[str], pieces: list[str], include: bool
) -> None:
    expected = reference(stops, "".join(pieces), include=include)
    assert search(stops, pieces, include=include) == expected


@settings(max_examples=200, deadline=None)
@given(
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    pieces=st.lists(st.text("abc", max_size=6), max_size=12),
)
def test_only_a_possible_match_is_held_back(stops: list[str], pieces: list[str]) -> None:
    checker, seen, shown = StopStrings(stops), "", ""
    for piece in pieces:
        text, stop = checker.add(piece)
        seen, shown = seen + piece, shown + text
        if stop is not None:
            return
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(s.startswith(held) and s != held for s in stops)


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert StopStrings([]).add("abc") == ("abc", None)
