"""Writes the config and tokenizer of a GGUF as Hugging Face files: ``python -m
vllm_di.models.gguf_convert FILE FOLDER``.

transformers converts the tokenizer; it is slow to load, so this runs once for each file, in a
process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_di.components.loader.gguf_tensors import metadata, open_gguf
from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.gguf_config import end_tokens, hf_config


class NotWrittenError(Exception):
    """The result cannot be written: the disk is full, say."""


def convert(path: Path, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    reader = open_gguf(path)
    facts = metadata(reader)
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
    from transformers import AutoTokenizer

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    ends = end_tokens(facts)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    try:
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        (folder / "config.json").write_text(json.dumps(config))
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
        print(error)
        raise SystemExit(2) from None
    except NotWrittenError as error:
        print(error)
        raise SystemExit(4) from None
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
