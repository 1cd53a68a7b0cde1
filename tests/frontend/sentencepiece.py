"""A small tokenizer of the Llama 2 kind: ``▁`` for spaces, byte tokens for what the vocabulary
lacks, and a decoder that strips the first space."""

from __future__ import annotations

import functools
import tempfile
import weakref
from pathlib import Path

import msgspec

WORDS = ["▁", "▁The", "▁cap", "ital", "▁of", "▁France", "▁is", "▁Paris", "▁x", "é", "你", "好"]


@functools.cache
def folder() -> str:
    """A temporary folder with ``tokenizer.json``, made once a run."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS, *letters]
    words = [w for w in WORDS if len(w) > 1]
    parts: list[str] = []
    merges: list[str] = []
    for word in words:  # each word is merged letter by letter
        for i in range(1, len(word)):
            merge = f"{word[:i]} {word[i]}"
            if merge not in merges:
                merges.append(merge)
                parts.append(word[: i + 1])
    tokens += [p for p in dict.fromkeys(parts) if p not in tokens]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, **special} for i in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    holder = tempfile.TemporaryDirectory(prefix="sentencepiece-")
    path = Path(holder.name)
    weakref.finalize(folder, holder.cleanup)
    (path / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_bytes(msgspec.json.encode(config))
    return str(path)
