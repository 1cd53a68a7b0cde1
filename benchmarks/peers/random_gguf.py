"""A GGUF of random bf16 weights, for engines that cannot make up weights themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

MATRICES = {
    "attn_q": ("hidden", "heads"),
    "attn_k": ("hidden", "kv"),
    "attn_v": ("hidden", "kv"),
    "attn_output": ("heads", "hidden"),
    "ffn_gate": ("hidden", "inner"),
    "ffn_up": ("hidden", "inner"),
    "ffn_down": ("inner", "hidden"),
}
"""Of a layer: inputs and outputs."""
BF16 = gguf.GGMLQuantizationType.BF16


def write(file: Path, config: dict[str, Any]) -> None:
    """A Llama of this shape with tied embeddings and no vocabulary."""
    head = config["head_dim"]
    sizes = {
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "heads": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
    }
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor(
        "token_embd.weight", random(config["vocab_size"], sizes["hidden"]), raw_dtype=BF16
    )
    ones = np.ones(sizes["hidden"], np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(config["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        for name, (inputs, outputs) in MATRICES.items():
            matrix = random(sizes[outputs], sizes[inputs])
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix, raw_dtype=BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random(outputs: int, inputs: int) -> Any:
    """[outputs, 2 * inputs] bytes: bf16 numbers of the size that training leaves. One block of them
    again and again: their values do not matter here."""
    numbers = np.random.default_rng(outputs).normal(0, 0.02, 1 << 16).astype(np.float32)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return np.resize(block, (outputs, inputs)).view(np.uint8)
