"""Writes the config and tokenizer of a GGUF as Hugging Face files: ``python -m
vllm_di.models.gguf_convert FILE FOLDER``.

Reading a large vocabulary takes seconds, so this runs once for each file, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_di.components.loader.gguf_tensors import metadata, open_gguf
from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.gguf_config import generation_config, hf_config
from vllm_di.models.gguf_tokenizer import build_tokenizer, tokenizer_config


class NotWrittenError(Exception):
    """The result cannot be written: the disk is full, say."""


def convert(path: Path, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    reader = open_gguf(path)
    facts = metadata(reader, vocabulary=True)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: has no tensor token_embd.weight: it is no language model")

    def vector(name: str) -> Sequence[float] | None:
        found = tensors.get(name)
        return None if found is None else [float(x) for x in found.data.reshape(-1)]

    config = hf_config(
        facts,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tied="output.weight" not in tensors,
        vector=vector,
    )
    tokenizer = build_tokenizer(facts)
    files = {
        "tokenizer_config.json": tokenizer_config(facts),
        "generation_config.json": generation_config(facts),
        "config.json": config,
    }
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise NotWrittenError(str(error)) from error


def main() -> None:
    """On failure a line on standard output, and exit status 3 for a model of a foreign kind, 2 for
    a damaged file, 4 for a folder that cannot be written, 1 for anything else."""
    path, folder = map(Path, sys.argv[1:3])
    try:
        convert(path, folder)
    except UnsupportedModelError as error:
        print(f"{path}: {error}")
        raise SystemExit(3) from None
    except CheckpointError as error:
        print(error if str(path.parent) in str(error) else f"{path}: {error}")
        raise SystemExit(2) from None
    except NotWrittenError as error:
        print(error)
        raise SystemExit(4) from None
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
