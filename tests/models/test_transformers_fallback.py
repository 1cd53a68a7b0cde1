"""Models without native code: transformers' own, on our attention and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.models.runner import BLOCK, Running, attention, device, ops

from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.safetensors import find_files, read_files
from vllm_di.errors import UnsupportedModelError
from vllm_di.models.checkpoint import describe
from vllm_di.models.config import DecoderConfig
from vllm_di.models.hf_config import is_native, model_fields
from vllm_di.models.transformers_fallback import TransformersModel

TOKENS = [(7 * i * i + 3 * i) % 97 + 1 for i in range(70)]
SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "GPTNeoX": ("GPTNeoX", SHAPE),
    "Olmo2": ("Olmo2", SHAPE | {"num_key_value_heads": 2}),
    "Cohere": ("Cohere", SHAPE | {"num_key_value_heads": 2, "logit_scale": 0.25}),
    "Starcoder2": ("Starcoder2", SHAPE | {"num_key_value_heads": 2, "sliding_window": 17}),
}
MLA = SHAPE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
}
"""Keys of 24 elements beside values of 16, in the proportions of DeepSeek's."""
LATENT: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV2": ("DeepseekV2", MLA | {"q_lora_rank": None, "topk_method": "greedy"}),
    "DeepseekV3": ("DeepseekV3", MLA | {"q_lora_rank": 24}),
    "wider values": ("DeepseekV3", MLA | {"q_lora_rank": 24, "v_head_dim": 32}),
}


def save(family: str, changes: dict[str, Any], folder: Path) -> Any:
    known = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**(known | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).float().eval()
    model.save_pretrained(folder)
    return model


def fallback(folder: Path, name: str = "paged") -> Running:
    found = describe(str(folder))
    fields = model_fields(found.hf_config, found.generation_config)
    config = DecoderConfig(path=str(folder), dtype="float32", **fields)
    on = device()
    table = ops("torch", on)
    layout = HndLayout(on, block_size=BLOCK, dtype="auto")
    backend = attention(name, table, layout)
    single = SingleCommunicator(Placement())
    model = TransformersModel(on, backend, single, config=config)
    model.load_weights(read_files(find_files(folder)))
    return Running(model, backend, layout)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = save(*CASES[case], tmp_path)
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0]
    running = fallback(tmp_path)
    parts = [TOKENS[:19], TOKENS[19:61], *([t] for t in TOKENS[61:])]
    got = torch.cat([running.feed(part) for part in parts])
    assert float((got - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("case", LATENT)
def test_latent_attention_uncompressed_equals_transformers(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = save(*LATENT[case], tmp_path)
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0]
    running = fallback(tmp_path)
    parts = [TOKENS[:19], TOKENS[19:61], *([t] for t in TOKENS[61:])]
    got = torch.cat([running.feed(part) for part in parts])
    assert float((got - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))
    values = LATENT[case][1]["v_head_dim"]
    size = max(24, values)
    assert {spec.head_size for spec in running.model.kv_specs()} == {size}
    assert f"keys have 24 elements and its values {values}: the KV cache holds both" in caplog.text


SINKS = SHAPE | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def test_attention_sinks_equal_transformers(tmp_path: Path) -> None:
    theirs = save("GptOss", SINKS, tmp_path)
    assert all(layer.self_attn.sinks.abs().max() > 0.1 for layer in theirs.model.layers)
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0]
    running = fallback(tmp_path, "sdpa")
    parts = [TOKENS[:19], TOKENS[19:61], *([t] for t in TOKENS[61:])]
    got = torch.cat([running.feed(part) for part in parts])
    assert float((got - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))


def test_sinks_that_attention_does_not_take_are_refused(tmp_path: Path) -> None:
    save("GptOss", SINKS, tmp_path)
    words = r"sinks, which PagedAttention does not take; attention=sdpa does"
    with pytest.raises(UnsupportedModelError, match=words):
        fallback(tmp_path)


def test_a_native_family_runs_on_it_too(tmp_path: Path) -> None:
    theirs = save("Qwen3", SHAPE | {"num_key_value_heads": 2, "head_dim": 16}, tmp_path)
    assert is_native("Qwen3ForCausalLM")
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert float((fallback(tmp_path).feed(TOKENS) - want).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 4}, "cannot be replaced"),
        ("StableLm", SHAPE | {"num_attention_heads": 3}, "cannot be replaced"),
        ("Mamba", {"hidden_size": 48, "num_hidden_layers": 2}, "cannot be replaced"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save(family, changes, tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{words}.*native are .*LlamaForCausalLM"):
        fallback(tmp_path)


def test_what_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"T5.*is no causal language model.*native"):
        fallback(tmp_path)
