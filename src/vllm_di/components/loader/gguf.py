"""Weights from a GGUF file: dequantised once to the model's dtype, cached, and read from the cache
after that."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from torch import Tensor

from vllm_di.components.interfaces import Loader, Model
from vllm_di.components.loader.progress import shown
from vllm_di.components.loader.safetensors import read_files
from vllm_di.errors import CheckpointError

log = logging.getLogger(__name__)

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES = {
    "llama": NAMES,
    "granite": NAMES,
    "qwen2": NAMES,
    "qwen3": NAMES,
    "gemma2": GEMMA_NAMES,
    "gemma3": GEMMA_NAMES,
}
PERMUTED = ("llama", "granite")
"""llama.cpp reorders the rows of q and k in these, to rotate neighbours instead of halves."""


class GgufLoader(Loader):
    """``path`` is the file, ``cache`` the folder that the conversion goes to; null converts at each
    start."""

    def __init__(self, *, path: str | None, cache: str | None, progress: bool) -> None:
        self._path, self._cache, self._progress = path, cache, progress

    def load(self, model: Model) -> None:
        if self._path is None:
            raise CheckpointError("loader=gguf has no file: set model.path to one")
        path = Path(self._path)
        if self._cache is None:
            weights = read_gguf(path, model.dtype)
        else:
            name = str(model.dtype).removeprefix("torch.")
            cached = Path(self._cache) / f"weights-{name}.safetensors"
            if not cached.is_file() and not _write(path, cached, model.dtype):
                weights = read_gguf(path, model.dtype)
            else:
                weights = read_files([cached])
        model.load_weights(shown(weights, self._progress))


def _write(path: Path, cached: Path, dtype: torch.dtype) -> bool:
    """Convert into the cache, by rename; False when the cache cannot be written."""
    log.info("converting %s once to %s", path.name, cached)
    tensors = dict(read_gguf(path, dtype))
    try:
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            save_file(tensors, Path(scratch) / cached.name)
            (Path(scratch) / cached.name).rename(cached)
    except OSError as error:
        log.warning("the cache %s cannot be written (%s): converting at each start", cached, error)
        return False
    return True


def read_gguf(path: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every tensor. Raises CheckpointError naming tensor and
    file."""
    try:
        reader = GGUFReader(path)
    except Exception as error:
        # the reader raises whatever numpy or struct raise on a file that ends too early
        raise CheckpointError(f"{path}: damaged or truncated: {_first_line(error)}") from None
    architecture = _text(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF files of architecture {architecture!r} are not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    heads = _number(reader, f"{architecture}.attention.head_count")
    kv_heads = _number(reader, f"{architecture}.attention.head_count_kv") or heads
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":
            raise CheckpointError(
                f"{path}: tensor rope_freqs.weight (scaled rotary frequencies) is not supported; "
                "use the safetensors of this model"
            )
        name = _name(entry.name, architecture, path)
        try:
            array = dequantize(entry.data, entry.tensor_type)
        except Exception as error:
            kind = getattr(entry.tensor_type, "name", entry.tensor_type)
            raise CheckpointError(
                f"{path}: tensor {entry.name} of type {kind} cannot be read: {_first_line(error)}"
            ) from None
        tensor = torch.from_numpy(array.copy()).reshape(entry.shape.tolist()[::-1])
        if architecture in PERMUTED and entry.name.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _unpermute(tensor, heads if "attn_q" in entry.name else kv_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor - 1  # llama.cpp stores 1 + weight
        yield name, tensor.to(dtype).contiguous()


def _name(name: str, architecture: str, path: Path) -> str:
    names = ARCHITECTURES[architecture]
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in names:
        raise CheckpointError(f"{path}: tensor {name} is unknown in a {architecture} file")
    prefix = f"model.layers.{found[1]}." if found[1] is not None else ""
    return f"{prefix}{names[found[2]]}.{found[3]}"


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """[heads * (half, 2), in] -> [heads * (2, half), in]."""
    split = weight.unflatten(0, (heads, -1, 2))
    return split.transpose(1, 2).reshape(weight.shape)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _text(reader: GGUFReader, key: str) -> str:
    return str(_field(reader, key))


def _number(reader: GGUFReader, key: str) -> int:
    value = _field(reader, key)
    return int(value) if isinstance(value, int) else 0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
