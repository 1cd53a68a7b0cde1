"""A byte-level stand-in for models without a tokenizer (random weights, tests)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated

import msgspec

from vllm_di.components.interfaces import PairTokens, Tokenizer
from vllm_di.components.tokenizer.pairs import longest_first

_BOS, _EOS = 256, 257


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 and 257 (where the vocabulary has them) begin and end a text. Any
    id beyond decodes to a placeholder such as ``⟨300⟩``."""

    def __init__(self, *, vocab_size: Annotated[int, msgspec.Meta(ge=256)] | None) -> None:
        self.vocab_size = 258 if vocab_size is None else vocab_size
        has_marks = self.vocab_size > _EOS
        self.bos_token = "<s>" if has_marks else None
        self.eos_token = "</s>" if has_marks else None
        self.eos_token_id = _EOS if has_marks else None
        self._marks = {_BOS: "<s>", _EOS: "</s>"} if has_marks else {}
        logging.getLogger(__name__).warning(
            "tokenizer=bytes is a stand-in: it turns bytes to token ids, whatever the model has "
            "learnt; set tokenizer.path for a trained model"
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        return [_BOS, *data] if add_special_tokens and self._marks else list(data)

    def encode_pair(
        self,
        one: str,
        other: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        max_other: int | None = None,
    ) -> PairTokens:
        """``<s> one </s> other </s>``"""
        first = self.encode(one, add_special_tokens=False)
        second = self.encode(other, add_special_tokens=False)[:max_other]
        marked = add_special_tokens and bool(self._marks)
        if max_tokens is not None:
            room = max_tokens - (3 if marked else 0)
            sizes = longest_first(len(first), len(second), room)
            first, second = first[: sizes[0]], second[: sizes[1]]
        if marked:
            first, second = [_BOS, *first, _EOS], [*second, _EOS]
        return PairTokens(first + second, [0] * len(first) + [1] * len(second))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        parts: list[str] = []
        kept = (i for i in token_ids if not (skip_special_tokens and i in self._marks))
        for is_byte, run in groupby(kept, key=lambda i: i < 256):
            if is_byte:
                parts.append(bytes(run).decode("utf-8", errors="replace"))
            else:
                parts += map(self._name, run)
        return "".join(parts)

    def token_text(self, token_id: int) -> str:
        if token_id < 128 and chr(token_id).isprintable():
            return chr(token_id)
        return f"\\x{token_id:02x}" if token_id < 256 else self._name(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return self._name(token_id).encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._marks

    def _name(self, token_id: int) -> str:
        return self._marks.get(token_id, f"⟨{token_id}⟩")
