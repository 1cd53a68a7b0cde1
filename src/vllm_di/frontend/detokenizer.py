"""Incremental detokenisation, and the search for stop strings.

The pieces that ``Detokenizer`` and ``StopStrings`` return, joined, are exactly the whole text: text
that a later token could still change is held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from vllm_di.components.interfaces import Tokenizer

_BROKEN = "\ufffd"
_PROMPT_TAIL = 6
"""Prompt tokens that are decoded together with the first output, whose text may depend on them (a
leading space)."""


class Detokenizer:
    """Incremental decoding of one sequence. The cost of a token does not grow with the text.

    It keeps a window of tokens: those whose text was returned last, as context for the decoder,
    then those still held back. An incomplete character is held back. Byte tokens such as ``<0xE2>``
    are held back until another token follows, because a run of them is decoded as a whole.

    A byte-level tokenizer needs no window: the bytes of each token go through a UTF-8 decoder.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = _utf8_decoder() if tokenizer.is_byte_level else None
        if self._utf8 is not None:
            return
        self._window = [i for i in prompt_token_ids[-_PROMPT_TAIL:] if not self.drops(i)]
        context = self._decode()
        if context.endswith(_BROKEN):
            self._window, context = [], ""
        self._num_shown = len(self._window)  # tokens at the window's start
        self._shown_length = len(context)  # characters of the window's text

    def add(self, token_id: int) -> str:
        """Take one token; return the text that can no longer change, often just this token's."""
        if self._utf8 is not None:
            if self._skip and self._tokenizer.is_special(token_id):
                return ""
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if self.drops(token_id):
            return ""
        self._window.append(token_id)
        if self.is_byte_token(token_id):
            return ""
        text = self._decode()
        if text.endswith(_BROKEN) and (num_open := self._num_open_bytes()):
            return self._show_all_but_last(text, num_open)
        return self._show(text)

    def flush(self) -> str:
        """End the text: return what was held back, incomplete characters included."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._show(self._decode())

    def drops(self, token_id: int) -> bool:
        """Whether a token has no text: it would only make the window longer."""
        if self._skip and self._tokenizer.is_special(token_id):
            return True
        return not self._tokenizer.token_text(token_id)

    def is_byte_token(self, token_id: int) -> bool:
        """Whether it is one of ``<0x00>`` to ``<0xFF>``, which a byte-level tokenizer has not."""
        if self._utf8 is not None:
            return False
        text = self._tokenizer.token_text(token_id)
        return len(text) == 6 and text.startswith("<0x")

    def _show(self, text: str) -> str:
        new = text[self._shown_length :]
        if new:
            del self._window[: self._num_shown]
            self._num_shown = len(self._window)
            self._shown_length = len(self._decode())
        return new

    def _show_all_but_last(self, text: str, num_open: int) -> str:
        """The last character is incomplete; it began at most ``num_open`` tokens ago. Text before
        it is final and leaves the window: the lead byte of a character needs no context."""
        new = text[self._shown_length : -1]
        del self._window[:-num_open]
        self._num_shown = 0
        self._shown_length = len(self._decode()) - 1
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)

    def _num_open_bytes(self) -> int:
        """Bytes at the end of the window that the next token may complete to a character; 0 when
        the U+FFFD there is final."""
        decoder = _utf8_decoder()
        decoder.decode(b"".join(map(self._tokenizer.token_bytes, self._window)))
        return len(decoder.getstate()[0])


class StopStrings:
    """Finds the first complete stop string in text that arrives in pieces. Holds back text that
    could be the start of one. Linear in the text (Knuth, Morris, Pratt)."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = list(stops)
        self._failures = [_failure_function(stop) for stop in stops]
        self._include = include
        self._matched = [0] * len(self._stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Take a piece; return the text that may be shown, and the stop string that ended it, if
        any."""
        if not self._stops:
            return text, None
        start, self._held = len(self._held), self._held + text
        for end in range(start, len(self._held)):
            if (stop := self._advance(self._held[end])) is not None:
                cut = end + 1 if self._include else end + 1 - len(stop)
                shown, self._held = self._held[:cut], ""
                return shown, stop
        keep = len(self._held) - max(self._matched)
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown, None

    def flush(self) -> str:
        """Return what is held back. The search starts anew after it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        """Advance by one character. The first stop string, in the order of the list, that ends
        here."""
        first = None
        for i, stop in enumerate(self._stops):
            length = self._matched[i]
            while length and stop[length] != char:
                length = self._failures[i][length - 1]
            length += stop[length] == char
            self._matched[i] = length
            if length == len(stop) and first is None:
                first = stop
        return first


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _failure_function(pattern: str) -> list[int]:
    """Entry i is the length of the longest proper prefix of pattern[: i + 1] that is also its
    suffix."""
    table, length = [0] * len(pattern), 0
    for i in range(1, len(pattern)):
        while length and pattern[length] != pattern[i]:
            length = table[length - 1]
        length += pattern[length] == pattern[i]
        table[i] = length
    return table
