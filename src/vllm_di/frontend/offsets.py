"""Where each token's text begins in the text of its sequence."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from vllm_di.components.interfaces import Tokenizer
from vllm_di.frontend.detokenizer import Detokenizer


class TextOffsets:
    """Counts characters while tokens arrive; the cost of a token does not grow with the text.

    A token that continues a character has the offset of that character. One without text, such as a
    special token that is skipped, has that of what follows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._length = 0
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = 0
        """Whole characters of a run of byte tokens, which the detokenizer holds back."""

    def add(self, token_id: int) -> int:
        """Take one token; return where its text begins."""
        offset = self._length + self._held
        if self._detokenizer.drops(token_id):
            return offset
        if self._detokenizer.is_byte_token(token_id):
            self._held += len(self._bytes.decode(self._tokenizer.token_bytes(token_id)))
        else:
            self._held = 0
            self._bytes.reset()
        self._length += len(self._detokenizer.add(token_id))
        return offset


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Offsets of a prompt's tokens into its text. The text holds the special tokens that were
    written in it, but not the mark that the tokenizer put before it."""
    marks = 0
    is_skipping = False
    if tokenizer.decode(token_ids, skip_special_tokens=False) != text:
        is_skipping = tokenizer.decode(token_ids, skip_special_tokens=True) == text
        marks = int(not is_skipping and tokenizer.is_special(token_ids[0]))
    offsets = TextOffsets(tokenizer, skip_special_tokens=is_skipping)
    return [0] * marks + [min(offsets.add(i), len(text)) for i in token_ids[marks:]]
