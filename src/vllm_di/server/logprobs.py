"""Logprobs in the formats of chat and of plain completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.messages import TokenLogprobs
from vllm_di.frontend.offsets import TextOffsets, prompt_offsets
from vllm_di.frontend.outputs import position_logprobs, token_string

_LOWEST = -9999.0
"""OpenAI's value for minus infinity, which JSON cannot express."""


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """``choices[].logprobs`` of chat completions."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        text = data.decode("utf-8", errors="replace")
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(data)}

    content = []
    for entry in entries:
        first, *top = [shown(i, p) for i, p in zip(entry.token_ids, entry.logprobs, strict=True)]
        content.append({**first, "top_logprobs": top})
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """``choices[].logprobs`` of plain completions, for one choice, piece by piece. Offsets count
    characters from the start of the text, including an echoed prompt. ``prompt_token_ids`` are the
    context in which the first token is decoded."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        has_top: bool,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._has_top = has_top
        self._offsets = TextOffsets(
            tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._start = 0

    def prompt(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs] | None, text: str
    ) -> dict[str, Any]:
        """The echoed prompt. Its first token has no logprob."""
        self._start = len(text)
        tokens, logprobs, tops = self._values(entries or ())
        first = token_string(self._tokenizer, token_ids[0])
        return {
            "tokens": [first, *tokens],
            "token_logprobs": [None, *logprobs],
            "top_logprobs": [None, *tops] if self._has_top else None,
            "text_offset": prompt_offsets(self._tokenizer, token_ids, text)[: 1 + len(tokens)],
        }

    def piece(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens."""
        tokens, logprobs, tops = self._values(entries)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self._has_top else None,
            "text_offset": [self._start + self._offsets.add(e.token_ids[0]) for e in entries],
        }

    def _values(
        self, entries: Sequence[TokenLogprobs]
    ) -> tuple[list[str], list[float], list[dict[str, float]]]:
        tokens: list[str] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        for entry in entries:
            texts = [token_string(self._tokenizer, i) for i in entry.token_ids]
            values = [max(p, _LOWEST) for p in entry.logprobs]
            tokens.append(texts[0])
            logprobs.append(values[0])
            top: dict[str, float] = {}
            for text, value in zip(texts, values, strict=True):
                # partial characters have equal texts: the most likely one stays
                top.setdefault(text, value)
            tops.append(top)
        return tokens, logprobs, tops


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two pieces as one."""
    return {k: None if first[k] is None else first[k] + second[k] for k in first}


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs] | None
) -> list[dict[str, Any] | None] | None:
    """vLLM's ``prompt_logprobs``: for each prompt token a map from token id to logprob, rank and
    text."""
    if entries is None:
        return None
    result: list[dict[str, Any] | None] = [None]
    for entry in entries:
        position = position_logprobs(tokenizer, entry)
        result.append(
            {
                str(token_id): {
                    "logprob": max(p.logprob, _LOWEST),
                    "rank": p.rank,
                    "decoded_token": p.decoded_token,
                }
                for token_id, p in position.items()
            }
        )
    return result
