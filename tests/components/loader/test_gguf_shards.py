"""Models that are split over several GGUF files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.models.gguf_files import finish
from tests.models.vocabularies import sentencepiece

from vllm_di.components.loader.gguf_shards import shards_of
from vllm_di.components.loader.gguf_tensors import open_gguf, read_gguf
from vllm_di.errors import CheckpointError
from vllm_di.models.checkpoint import describe

COUNT = 3
TOKENS: list[str] = sentencepiece()["tokenizer.ggml.tokens"]
NAMES = ["token_embd.weight", "output.weight", "blk.0.ffn_up.weight"]


def add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, value)


def split(folder: Path, stem: str = "m", **changes: Any) -> list[Path]:
    """Three files with a tensor each; the metadata is in the first."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, name in enumerate(NAMES):
        file = folder / f"{stem}-{number + 1:05d}-of-{COUNT:05d}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_uint16("split.no", changes.get("no", number))
        writer.add_uint16("split.count", changes.get("count", COUNT))
        writer.add_int32("split.tensors.count", changes.get("total", COUNT))
        if number == 0:
            for key, value in sentencepiece().items():
                add(writer, key, value)
            writer.add_embedding_length(8)
            writer.add_feed_forward_length(16)
            writer.add_block_count(1)
            writer.add_head_count(2)
            writer.add_context_length(64)
            writer.add_layer_norm_rms_eps(1e-5)
        rows = 16 if "ffn" in name else len(TOKENS)
        writer.add_tensor(
            changes.get("name", name),
            np.full((rows, 8), number + changes.get("plus", 0), np.float32),
        )
        files.append(finish(writer, file))
    return files


def test_the_tensors_of_all_shards_are_read_from_any(tmp_path: Path) -> None:
    for file in split(tmp_path):
        found = dict(read_gguf(file, torch.float32))
        assert list(found) == [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.layers.0.mlp.up_proj.weight",
        ]
        assert [float(t.mean()) for t in found.values() if isinstance(t, torch.Tensor)] == [0, 1, 2]


def test_a_split_model_is_described_once(tmp_path: Path) -> None:
    files = split(tmp_path / "a")
    first, last = (describe(str(f), cache_dir=tmp_path / "cache") for f in (files[0], files[-1]))
    assert first == last
    assert first.weights == str(files[0])
    assert first.hf_config["tie_word_embeddings"] is False, "the head is in the second shard"
    others = split(tmp_path / "b", plus=1)
    others[0].write_bytes(files[0].read_bytes())
    other = describe(str(others[0]), cache_dir=tmp_path / "cache")
    assert other.tokenizer != first.tokenizer, "the same first shard, but another model"


@pytest.mark.parametrize("missing", range(COUNT))
def test_a_missing_shard_is_named(missing: int, tmp_path: Path) -> None:
    files = split(tmp_path)
    files[missing].unlink()
    given = files[1] if missing != 1 else files[0]
    message = (
        rf"{re.escape(str(files[missing]))}: no such file: shard {missing + 1} of 3 is missing"
    )
    with pytest.raises(CheckpointError, match=message):
        open_gguf(given)
    with pytest.raises(CheckpointError, match=message):
        describe(str(given), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"count": 4}, "is one of 4 files"),
        ({"no": 0}, r"00002-of-00003\.gguf: says that it is file 1 of 3, expected file 2 of 3"),
        ({"total": 5}, "has 3 tensors in all, expected 5"),
        ({"name": "output.weight"}, r"tensor output\.weight is in another shard too"),
    ],
)
def test_shards_that_do_not_fit_are_named(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_gguf(split(tmp_path, **changes)[0])


def test_a_first_shard_under_another_name_is_named(tmp_path: Path) -> None:
    file = split(tmp_path)[0].rename(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"expected NAME-00001-of-00003\.gguf"):
        open_gguf(file)


def test_names_of_shards(tmp_path: Path) -> None:
    assert shards_of(tmp_path / "plain.gguf") == [tmp_path / "plain.gguf"]
    for name in ("m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00000-of-00000.gguf"):
        with pytest.raises(CheckpointError, match="cannot be"):
            shards_of(tmp_path / name)
