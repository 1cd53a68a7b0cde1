"""The decoder's weights shared out over ranks: the same logits, with loaded and with random
weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.checkpoints import make
from tests.models.ranks import on_ranks
from tests.models.runner import BLOCK, Running, attention, device, load, ops
from torch import Tensor

from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import Communicator, Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.errors import ConfigError
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder

TOKENS = [5, 71, 3, 44, 98, 12, 60, 7, 33, 21]
RANDOM = DecoderConfig(
    architecture="LlamaForCausalLM",
    dtype="float32",
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
)


def random_logits(config: DecoderConfig, communicator: Communicator, seed: int = 5) -> Tensor:
    on = device()
    table = ops("torch", on)
    layout = HndLayout(on, block_size=BLOCK, dtype="auto")
    backend = attention("sdpa", table, layout)
    model = Decoder(on, table, backend, communicator, NoQuantization(table), config=config)
    model.load_random(seed)
    return Running(model, backend, layout).feed(TOKENS)


@pytest.mark.parametrize(
    "case", ["llama2", "llama_gqa_tied", "llama_biases", "phi3", "gemma2", "qwen3_moe_mixed"]
)
def test_two_ranks_equal_one(case: str, tmp_path: Path) -> None:
    make(case, tmp_path)
    want = load(tmp_path).feed(TOKENS)
    for got in on_ranks(2, lambda rank: load(tmp_path, communicator=rank).feed(TOKENS)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_random_weights_are_the_same_on_any_number_of_ranks(world_size: int) -> None:
    """Four and eight ranks share two key and value heads."""
    want = random_logits(RANDOM, SingleCommunicator(Placement()))
    assert not torch.allclose(want, random_logits(RANDOM, SingleCommunicator(Placement()), seed=6))
    for got in on_ranks(world_size, lambda rank: random_logits(RANDOM, rank)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (3, r"num_attention_heads \(8\) cannot be split over 3 ranks"),
        (5, r"num_attention_heads \(8\) cannot be split over 5 ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(world_size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        on_ranks(world_size, lambda rank: random_logits(RANDOM, rank))


def test_key_heads_that_ranks_cannot_share_are_refused() -> None:
    import msgspec

    config = msgspec.structs.replace(RANDOM, num_attention_heads=12, num_key_value_heads=3)
    config = msgspec.structs.replace(config, head_dim=8)
    with pytest.raises(ConfigError, match=r"num_key_value_heads \(3\) cannot be .*4 ranks"):
        on_ranks(4, lambda rank: random_logits(config, rank))
