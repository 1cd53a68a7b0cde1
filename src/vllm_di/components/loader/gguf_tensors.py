"""The tensors of a GGUF file under their Hugging Face names, dequantised one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from vllm_di.components.loader.gguf_blocks import FLOATS, unpack
from vllm_di.components.loader.gguf_shards import shards_of
from vllm_di.components.quantized import GROUP, QuantizedWeight, by_group
from vllm_di.errors import CheckpointError

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
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES: dict[str, dict[str, str]] = {
    "llama": NAMES | MIXTRAL,
    "granite": NAMES,
    "smollm3": NAMES,
    "qwen2": NAMES,
    "qwen3": NAMES,
    "qwen3moe": NAMES | QWEN_EXPERTS,
    "phi3": NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gemma2": NAMES | GEMMA,
    "gemma3": NAMES | GEMMA,
}
"""llama.cpp's architectures that the native decoder covers, and their tensors' names."""
PERMUTED = ("llama", "granite", "smollm3")
"""llama.cpp reorders the rows of q and k in these, to rotate neighbours instead of halves."""
IN_CONFIG = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tensors that the conversion of the config reads."""


class _Reader(GGUFReader):  # type: ignore[misc]
    """Names the tensor that cannot be read."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        self.tensors: list[Any]
        tensors: dict[str, Any] = {}
        for field in fields:
            try:
                super()._build_tensors(start_offs, [field])
            except Exception as error:
                raise ValueError(f"tensor {field.name}: {_first_line(error)}") from None
            if field.name in tensors:
                raise ValueError(f"tensor {field.name} is there twice")
            tensors[field.name] = self.tensors[0]
        self.tensors = list(tensors.values())


def open_gguf(path: Path) -> GGUFReader:
    """The file, with the tensors of all its shards. Raises CheckpointError for a file that is no
    GGUF, one that ends too early, a shard that is missing or another model's, or a tensor of an
    unknown type; it names file and tensor."""
    first, *others = shards_of(path)
    reader = _open(first)
    count = int(_value(reader, "split.count", 1))
    if count > 1 and count != 1 + len(others):
        raise CheckpointError(
            f"{first}: is one of {count} files (split.count), but its name does not say so: "
            f"expected NAME-00001-of-{count:05d}.gguf"
        )
    names = {tensor.name for tensor in reader.tensors}
    for number, file in enumerate([first, *others]):
        shard = reader if number == 0 else _open(file)
        own = int(_value(shard, "split.no", number)), int(_value(shard, "split.count", count))
        if own != (number, count):
            raise CheckpointError(
                f"{file}: says that it is file {own[0] + 1} of {own[1]}, expected file "
                f"{number + 1} of {count}"
            )
        if number == 0:
            continue
        for tensor in shard.tensors:
            if tensor.name in names:
                raise CheckpointError(f"{file}: tensor {tensor.name} is in another shard too")
            names.add(tensor.name)
        reader.tensors += shard.tensors
    total = int(_value(reader, "split.tensors.count", len(names)))
    if total != len(names):
        raise CheckpointError(f"{first}: has {len(names)} tensors in all, expected {total}")
    return reader


def _open(path: Path) -> _Reader:
    try:
        return _Reader(path)
    except Exception as error:
        # the reader raises whatever numpy or struct raise where the file ends too early
        raise CheckpointError(f"{path}: damaged or truncated: {_first_line(error)}") from None


def _value(reader: GGUFReader, key: str, default: int) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def metadata(reader: GGUFReader, *, vocabulary: bool = False) -> Mapping[str, Any]:
    """Key to value, without the tokenizer's long lists unless ``vocabulary`` asks for them."""
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if vocabulary or not key.startswith("tokenizer.ggml.") or len(field.data) == 1
    }


def architecture_of(reader: GGUFReader, path: Path) -> str:
    """``general.architecture``. Raises CheckpointError for one that cannot be read here."""
    field = reader.get_field("general.architecture")
    name = str(field.contents()) if field is not None else ""
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF files of architecture {name!r} are not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return name


def read_gguf(
    path: Path, dtype: torch.dtype, *, keep: bool = False
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """(Hugging Face name, tensor) of every weight; with ``keep`` matrices, and those of
    experts, stay quantised. Raises CheckpointError naming tensor and file."""
    reader = open_gguf(path)
    architecture = architecture_of(reader, path)
    facts = metadata(reader)
    heads = int(facts.get(f"{architecture}.attention.head_count") or 1)
    kv_heads = int(facts.get(f"{architecture}.attention.head_count_kv") or heads)
    for entry in reader.tensors:
        kind = getattr(entry.tensor_type, "name", entry.tensor_type)
        name = _name(entry.name, architecture, path)
        if name is None:
            continue
        try:
            tensor = _read(entry, keep and len(entry.shape) in (2, 3))
        except Exception as error:
            # numpy and gguf have no exception of their own for what they cannot read
            raise CheckpointError(
                f"{path}: tensor {entry.name} of type {kind} cannot be read: {_first_line(error)}"
            ) from None
        if architecture in PERMUTED and ".attn_q." in entry.name:
            tensor = _rows(tensor, _unpermuted(tensor.shape[0], heads))
        if architecture in PERMUTED and ".attn_k." in entry.name:
            tensor = _rows(tensor, _unpermuted(tensor.shape[0], kv_heads))
        if isinstance(tensor, QuantizedWeight):
            rows = int(entry.shape[1])  # of a matrix; experts' lie one below the other
            for expert, start in enumerate(range(0, tensor.shape[0], rows)):
                yield name.format(expert), tensor.rows(slice(start, start + rows))
            continue
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor - 1  # llama.cpp stores 1 + weight
        tensor = tensor.to(dtype)
        if "{}" in name:  # [experts, out, in]
            for expert, part in enumerate(tensor):
                yield name.format(expert), part
        else:
            yield name, tensor.contiguous()


def _read(entry: Any, keep: bool) -> Tensor | QuantizedWeight:
    """fp32, or quantised with ``keep`` where the file has it so; then a matrix, all but the last
    dimension as one."""
    shape = entry.shape.tolist()[::-1]
    if keep and entry.tensor_type.name not in FLOATS and shape[-1] % GROUP == 0:
        data = entry.data.reshape(-1, entry.data.shape[-1])
        exact = unpack(entry.tensor_type.name, data)
        if exact is not None:
            return exact
        return by_group(torch.from_numpy(dequantize(data, entry.tensor_type)), 8)
    return torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).reshape(shape)


def _rows(tensor: Tensor | QuantizedWeight, order: Tensor) -> Tensor | QuantizedWeight:
    return tensor.rows(order) if isinstance(tensor, QuantizedWeight) else tensor[order]


def _name(name: str, architecture: str, path: Path) -> str | None:
    """None for what is no weight."""
    names = ARCHITECTURES[architecture]
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is not None and found[2] in IN_CONFIG:
        return None
    if found is None or found[2] not in names:
        raise CheckpointError(f"{path}: tensor {name} is unknown in a {architecture} file")
    prefix = f"model.layers.{found[1]}." if found[1] is not None else ""
    return f"{prefix}{names[found[2]]}.{found[3]}"


def _unpermuted(rows: int, heads: int) -> Tensor:
    """The order of rows that makes [heads * (half, 2)] into [heads * (2, half)]."""
    return torch.arange(rows, dtype=torch.int64).view(heads, -1, 2).transpose(1, 2).reshape(rows)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
