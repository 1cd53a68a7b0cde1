"""Small vocabularies, as the metadata of a GGUF holds them, and SentencePiece's own algorithm."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.models.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    build_tokenizer,
    tokenizer_config,
)

PIECES = "▁ h i ▁h ▁hi hi ▁▁ ▁▁▁ a aa aaa . ▁. é ▁the t e th the 好 你好 你".split()  # noqa: SIM905


def sentencepiece(**more: Any) -> dict[str, Any]:
    """Byte tokens for what the pieces lack, ``<tool>`` and a run of two newlines of the user's."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)]
    own = ["<tool>", "\n\n"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]
    facts = {
        "model": "llama",
        "pre": "default",
        "tokens": texts + own,
        "scores": scores + [-1000.0] * len(own),
        "token_type": types + [USER_DEFINED] * len(own),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (facts | more).items()}


def byte_level(**more: Any) -> dict[str, Any]:
    """All bytes, some merges, ``<|end|>`` as a control token and ``<tool>`` as the user's own."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [*map(chr, plain), *(chr(256 + i) for i in range(len(others)))]
    merges = ["h i", "Ġ hi", "t h", "th e", "Ġ the", "Ġ Ġ", "1 2", "12 3", "Ã ©"]
    texts = [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>", "<tool>"]
    facts = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": texts,
        "token_type": [NORMAL] * (len(texts) - 2) + [CONTROL, USER_DEFINED],
        "merges": merges,
        "eos_token_id": len(texts) - 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (facts | more).items()}


def tokenizer_of(facts: Mapping[str, Any], folder: Path) -> HfTokenizer:
    """As a server reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(facts).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(tokenizer_config(facts)))
    return HfTokenizer(path=str(folder))


def pieces_of(text: str, facts: Mapping[str, Any]) -> list[int]:
    """Ids of a text without tokens that are matched whole: join the two neighbours whose union has
    the best score, the left ones among equals, until none is left (Kudo and Richardson 2018;
    llama.cpp's SentencePiece tokenizer)."""
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    scores: list[float] = facts["tokenizer.ggml.scores"]
    parts: list[str] = list("▁" + text.replace(" ", "▁"))
    after, before = [*range(1, len(parts)), -1], list(range(-1, len(parts) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := parts[left] + parts[right]) in ids:
            heapq.heappush(queue, (-scores[ids[joined]], left, right, joined))

    for right in range(1, len(parts)):
        offer(right - 1, right)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if after[left] != right or not parts[right] or parts[left] + parts[right] != joined:
            continue
        parts[left], parts[right], after[left] = joined, "", after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    found: list[int] = []
    for part in filter(None, parts):
        found += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return found
