"""Text offsets: where the text of each token begins."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from vllm_di.components.interfaces import Tokenizer
from vllm_di.frontend.detokenizer import Detokenizer


class TextOffsets:
    """Counts characters while tokens arrive. The cost of a token does not grow with the text.

    A token that continues a character has the offset of that character. A token without text, such
    as a skipped special token, has the offset of the next one.
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
        """Complete characters in a run of byte tokens, which the detokenizer holds back."""

    def add(self, token_id: int) -> int:
        """Take one token; return its offset."""
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
    """Offsets of a prompt's tokens. ``text`` contains special tokens that the client wrote, but not
    a BOS token that the tokenizer added."""
    marks = 0
    is_skipping = False
    if tokenizer.decode(token_ids, skip_special_tokens=False) != text:
        is_skipping = tokenizer.decode(token_ids, skip_special_tokens=True) == text
        marks = int(not is_skipping and tokenizer.is_special(token_ids[0]))
    offsets = TextOffsets(tokenizer, skip_special_tokens=is_skipping)
    return [0] * marks + [min(offsets.add(i), len(text)) for i in token_ids[marks:]]
