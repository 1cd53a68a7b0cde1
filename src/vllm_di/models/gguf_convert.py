"""Writes the config and tokenizer of a GGUF as Hugging Face files: ``python -m
vllm_di.models.gguf_convert FILE FOLDER``.

transformers does the work; it is slow to load, so this runs once for each file, in a process of its
own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(path: Path, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    from transformers import AutoConfig, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**place)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    tokenizer.save_pretrained(folder)
    values = config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = values.get("architectures") or [_architecture(config)]
    if values.get("eos_token_id") is None:
        values["eos_token_id"] = tokenizer.eos_token_id
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": _ends(tokenizer, values)})
    )
    (folder / "config.json").write_text(json.dumps(values, default=str))


def _architecture(config: object) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = getattr(config, "model_type", "")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        print(f"model type {kind!r} is no causal language model that transformers knows")
        raise SystemExit(3)
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def _ends(tokenizer: object, values: dict[str, object]) -> list[int]:
    """End ids: the config's and the tokenizer's, which in chat models is the end of a turn."""
    ends: list[int] = []
    for token in (values.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)):
        if isinstance(token, int) and token not in ends:
            ends.append(token)
    return ends


def main() -> None:
    """Exit status 3 and a line on standard output for a model of a foreign kind, 1 for a bad
    file."""
    path, folder = map(Path, sys.argv[1:3])
    try:
        convert(path, folder)
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
