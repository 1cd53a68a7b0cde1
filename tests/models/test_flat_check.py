"""What the check after loading a model on transformers' code sees, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.models import families
from torch import Tensor, nn
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.interfaces import AttentionSpec
from vllm_di.components.loader.safetensors import find_files, read_files
from vllm_di.errors import ConfigError, UnsupportedModelError
from vllm_di.models.flat_check import _compare_rule, check_flat_steps, widened
from vllm_di.models.transformers_fallback import TransformersModel

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
LONG: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
}


def saved(family: str, changes: dict[str, Any], folder: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    families.shake(model)
    model.save_pretrained(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "olmoe", "mamba", "gptj", "llama4_text"])
def test_a_class_is_equal_or_refused_as_the_page_says(model_type: str) -> None:
    """The others are walked by ``make test-families``."""
    assert families.outcome(model_type) == families.recorded()[model_type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Lfm2", CONV, "state, mask or position does not go through attention"),
        ("Phi3", LONG, "state, mask or position does not go through attention"),
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "sinks"),
        ("Bloom", {}, "cannot be replaced"),
    ],
)
def test_what_would_run_wrong_is_refused(
    family: str, changes: dict[str, Any], words: str, dtype: str, tmp_path: Path
) -> None:
    saved(family, changes, tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"{family}ForCausalLM is refused: .*{words}"):
        families.load(tmp_path, dtype)


def test_scaling_that_begins_beyond_the_context_is_no_reason(tmp_path: Path) -> None:
    saved("Phi3", LONG, tmp_path)
    families.load(tmp_path, max_model_len=64)


def test_random_weights_are_checked_too(tmp_path: Path) -> None:
    saved("Lfm2", CONV, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"Lfm2ForCausalLM is refused"):
        families.load(tmp_path, random=True)


@pytest.mark.parametrize("window", [None, 2048, 3000])
def test_masks_are_compared_where_no_check_runs(window: int | None) -> None:
    host = torch.device("cpu")
    right = sliding_window_causal_mask_function(window) if window else causal_mask_function
    _compare_rule(right, window, 8192, host)
    narrower = [sliding_window_causal_mask_function(n) for n in (1000, 2047, 2999)]
    narrower += [
        chunked_causal_mask_function(n, torch.zeros(1, dtype=torch.long)) for n in (999, 2048)
    ]
    for rule in narrower:
        with pytest.raises(UnsupportedModelError, match=r"its mask at query \d+, key \d+"):
            _compare_rule(rule, window, 8192, host)
    _compare_rule(
        chunked_causal_mask_function(2048, torch.zeros(1, dtype=torch.long)), None, 2048, host
    )


class Blind(SdpaAttention):
    """A backend without soft caps."""

    def check(self, spec: AttentionSpec) -> None:
        if spec.soft_cap is not None:
            raise ConfigError("no soft caps here")


def test_the_backend_is_asked_what_the_layers_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.make("gemma2", tmp_path)
    monkeypatch.setattr(families, "attention", lambda _, __, layout: Blind(layout))
    with pytest.raises(ConfigError, match="no soft caps here"):
        families.load(tmp_path)


def in_bf16(folder: Path) -> tuple[TransformersModel, dict[str, Tensor]]:
    families.make("qwen3", folder)
    model = families.load(folder, "bfloat16")
    tensors = read_files(find_files(folder))
    return model, {name: tensor.bfloat16() for name, tensor in tensors}


def test_the_weights_are_left_as_they_were(tmp_path: Path) -> None:
    model, want = in_bf16(tmp_path)
    have = dict(model._model.named_parameters())
    assert all(torch.equal(have[name], tensor) for name, tensor in want.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._model.modules())


def test_one_layer_at_a_time_is_wide(tmp_path: Path) -> None:
    model, _ = in_bf16(tmp_path)
    network, most = model._model, 0
    network.set_attn_implementation("eager")

    def count(*_: Any) -> None:
        nonlocal most
        wide = sum(p.numel() for p in network.parameters() if p.dtype == torch.float32)
        most = max(most, wide)

    with widened(network):
        hooks = [m.register_forward_pre_hook(count) for m in network.modules()]
        out = network(input_ids=torch.tensor([[5, 6, 7]])).logits
        for hook in hooks:
            hook.remove()
    layer = sum(p.numel() for p in network.model.layers[0].parameters())
    table = network.model.embed_tokens.weight.numel()
    assert most == max(layer, table)
    assert out.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in network.parameters())


def test_an_error_inside_leaves_nothing_wide(tmp_path: Path) -> None:
    model, _ = in_bf16(tmp_path)
    layers = model._model.model.layers

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        check_flat_steps(model._model, 4, model.max_model_len)
    hook.remove()
    assert all(p.dtype == torch.bfloat16 for p in model._model.parameters())
    check_flat_steps(model._model, 4, model.max_model_len)


BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: 3 * x,
    "capped": lambda x: 30 * torch.tanh(x / 30),
    "scaled and capped": lambda x: 15 * torch.tanh(x / 5),
    "clipped": lambda x: x.clamp(-20, 20),
    "slightly bent": lambda x: x + 1e-3 * x.abs(),
    "shifted": lambda x: x + 0.01,
}


def bend(model: nn.Module, how: str) -> None:
    def after(_: nn.Module, __: Any, out: Any) -> Any:
        out.logits = BENDS[how](out.logits)
        return out

    model.register_forward_hook(after)


@pytest.mark.parametrize("how", BENDS)
def test_what_follows_the_head_is_followed_or_refused(how: str, tmp_path: Path) -> None:
    families.make("qwen3", tmp_path)
    ours = families.load(tmp_path)
    bend(ours._model, how)
    if how in ("clipped", "slightly bent", "shifted"):
        with pytest.raises(UnsupportedModelError, match="changes its logits after the head"):
            ours._check()
        return
    ours._check()
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        bend(theirs, how)
        theirs.set_attn_implementation("eager")
        want = families.own_logits(theirs)
    got = families.run(ours, families.steps())
    for one, other in zip(got, want, strict=True):
        assert float((one - other).abs().max()) < 1e-3
