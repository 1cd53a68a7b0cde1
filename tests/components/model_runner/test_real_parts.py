"""The runner with the real decoder, layout, attention, ops and sampler: a batch of mixed requests
equals each alone, chunked equals whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.components.model_runner.driver import BLOCK, Driver, Request, request
from torch import Tensor

from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.device.host import HostDevice
from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import AttentionBackend, ModelRunner, Placement
from vllm_di.components.kv_groups import group_layers
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.model_runner.standard import StandardModelRunner
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.program.eager import EagerProgram
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.sampler.standard import StandardSampler
from vllm_di.components.shapes.dynamic import DynamicShapes
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder

NUM_BLOCKS = 90

ASKED: list[dict[str, Any]] = [
    {"prompt": [5], "max_tokens": 12},
    {"prompt": list(range(40, 77)), "max_tokens": 9, "logprobs": 3},
    {"prompt": [9, 9, 9], "temperature": 1.0, "seed": 4, "top_p": 0.9, "max_tokens": 12},
    {"prompt": [60, 2, 31, 7], "temperature": 0.8, "seed": 4, "top_k": 7, "min_p": 0.01},
    {"prompt": list(range(8)), "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"prompt": [3, 1, 4, 1, 5], "prompt_logprobs": 2, "logprobs": 0},
    {"prompt": [8] * 17, "logit_bias": {11: 3.0}, "min_tokens": 3, "presence_penalty": 1.0},
    {"prompt": [70, 71], "allowed_token_ids": [3, 4, 5], "temperature": 2.0, "seed": 1},
]


def weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Random ones, large enough that tokens and contexts differ."""
    generator = torch.Generator().manual_seed(3)
    for name, target in model.targets().items():
        yield name, torch.randn(target.shape, generator=generator) * 0.4


def runner(attention: str) -> ModelRunner:
    """A tiny Llama with random weights in fp32."""
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    ops, layout = SelectedOps(TorchOps()), HndLayout(device, block_size=BLOCK, dtype="auto")
    backend: AttentionBackend = (
        SdpaAttention(layout) if attention == "sdpa" else PagedAttention(ops, layout)
    )
    config = DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        hidden_act="silu",
        tie_word_embeddings=False,
        eos_token_ids=[0],
    )
    communicator = SingleCommunicator(Placement())
    model = Decoder(device, ops, backend, communicator, NoQuantization(ops), config=config)
    model.load_weights(weights(model))
    found = StandardModelRunner(
        device=device,
        model=model,
        program=EagerProgram(model, backend, layout, EagerGraph()),
        kv_layout=layout,
        shapes=DynamicShapes(),
        graph=EagerGraph(),
        sampler=StandardSampler(ops),
        placement=Placement(),
        max_num_seqs=8,
        max_num_batched_tokens=128,
    )
    found.allocate(group_layers([model.kv_specs()]), NUM_BLOCKS)
    found.warm_up()
    return found


def run(attention: str, chunk: int, at_once: int) -> list[Request]:
    asked = [request(**one) for one in ASKED]
    return Driver(runner(attention), NUM_BLOCKS).run(asked, chunk=chunk, at_once=at_once)


@pytest.fixture(scope="module")
def alone() -> list[Request]:
    return run("sdpa", chunk=128, at_once=1)


def test_the_requests_are_worth_comparing(alone: list[Request]) -> None:
    assert len({tuple(one.output) for one in alone}) == len(ASKED)
    assert all(len(set(one.output)) > 1 for one in alone)


@pytest.mark.parametrize("attention", ["sdpa", "paged"])
@pytest.mark.parametrize(("chunk", "at_once"), [(128, 8), (5, 1), (3, 8), (1, 8)])
def test_together_and_chunked_equal_alone_and_whole(
    attention: str, chunk: int, at_once: int, alone: list[Request]
) -> None:
    for single, one in zip(alone, run(attention, chunk, at_once), strict=True):
        assert one.error is None
        assert one.output == single.output
        for left, right in zip(single.sampled, one.sampled, strict=True):
            if left.logprobs is not None:
                assert right.logprobs is not None
                (mine,), (theirs,) = right.logprobs, left.logprobs
                assert mine.token_ids == theirs.token_ids
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        prompt, alone_prompt = (
            [p for scored in r.prompt_logprobs for p in scored.positions] for r in (one, single)
        )
        assert [p.token_ids for p in prompt] == [p.token_ids for p in alone_prompt]
        for p, q in zip(prompt, alone_prompt, strict=True):
            assert p.logprobs == pytest.approx(q.logprobs, abs=1e-4)
