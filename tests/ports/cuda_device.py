"""platform=cuda on a real device. Not collected by itself: ``python -m benchmarks.gpu`` runs it on
a machine that has one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import Device, Placement
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError

MIB = 2**20
TINY = ["platform=cuda", "model=tiny", "model.max_model_len=256", "worker.num_blocks=64"]
PROMPTS = [list(range(20, 20 + n)) for n in (23, 3, 1, 40, 7)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens(*overrides: str, params: SamplingParams = GREEDY) -> list[list[int]]:
    with LLM(overrides=[*TINY, "scheduler.max_num_seqs=8", *overrides]) as llm:
        return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params)]


@pytest.fixture
def device() -> Iterator[Device]:
    with opened(
        WorkerContainer, assemble(TINY), only=["device"], placement=Placement()
    ) as container:
        yield container.device()


def test_what_the_device_says(device: Device) -> None:
    assert device.torch_device == torch.device("cuda", 0) and not device.on_host
    assert torch.bfloat16 in device.supported_dtypes and device.default_dtype == torch.bfloat16
    before = device.memory()
    assert before is not None and 0 < before.free <= before.total
    taken = device.zeros((64 * MIB,), torch.uint8)
    during = device.memory()
    assert during is not None and taken.is_cuda
    pinned = device.host_zeros((7,), torch.int32)
    assert pinned.is_pinned()
    wait = device.mark()
    wait()
    device.synchronize()


def test_a_budget_is_kept_and_given_back() -> None:
    limited = assemble([*TINY, "device.memory_budget=1GiB"])
    with opened(WorkerContainer, limited, only=["device"], placement=Placement()) as container:
        there = container.device()
        memory = there.memory()
        assert memory is not None and memory.total == 1024 * MIB
        with pytest.raises(torch.OutOfMemoryError):
            there.zeros((2048 * MIB,), torch.uint8)
    with opened(WorkerContainer, assemble(TINY), only=["device"], placement=Placement()) as after:
        assert after.device().zeros((2048 * MIB,), torch.uint8).numel() == 2048 * MIB


def test_a_budget_beyond_the_device_is_refused() -> None:
    much = assemble([*TINY, "device.memory_budget=100TiB"])
    with (
        pytest.raises(ConfigError, match="memory_budget"),
        opened(WorkerContainer, much, only=["device"], placement=Placement()),
    ):
        pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_give_what_eager_steps_give(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    kind = f"model.dtype={dtype}"
    with caplog.at_level(logging.INFO):
        captured = tokens(kind)
    assert "captured decode steps of 1, 2, 4, 8 tokens" in caplog.text
    assert captured == tokens(kind, "graph=eager")


def test_tokens_are_those_of_the_reference() -> None:
    reference = ["platform=cpu", "ops=torch", "graph=eager", "model.dtype=float32"]
    want = tokens(*reference)
    assert tokens("model.dtype=float32") == want
    assert tokens("model.dtype=float32", "attention=sdpa") == want
    assert tokens("model.dtype=float32", "attention=paged", "ops.paged_attention=torch") == want


def test_drawn_tokens_are_those_of_the_reference() -> None:
    drawn = SamplingParams(
        temperature=1, top_k=30, top_p=0.9, seed=1, max_tokens=12, ignore_eos=True
    )
    reference = ["platform=cpu", "ops=torch", "graph=eager", "model.dtype=float32"]
    assert tokens("model.dtype=float32", params=drawn) == tokens(*reference, params=drawn)


def test_chunks_of_prompts_and_a_full_cache() -> None:
    narrow = ["scheduler.max_num_batched_tokens=16", "kv_layout.block_size=16"]
    small = ["worker.num_blocks=9", "model.max_model_len=128", "model.dtype=float32"]
    assert tokens(*narrow, *small) == tokens("model.dtype=float32")
