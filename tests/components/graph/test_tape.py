"""Replayed steps: the same tokens, the choices honoured, the memory reused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tests.components.ops.libraries import ISAS, library, random

from vllm_di import LLM, SamplingParams
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.kernels.memory import Pool, huge_zeros

TINY = ["platform=cpu", "model.dtype=float32"]
PROMPTS = ["a", "hello world", "x" * 70]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def run(*overrides: str) -> tuple[list[list[int]], LLM]:
    with LLM("tiny", overrides=[*TINY, *overrides]) as llm:
        tokens = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
        tokens += [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:1], GREEDY)]
        return tokens, llm


def test_replayed_steps_give_the_same_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    eager, _ = run("graph=eager")
    assert run("graph=tape")[0] == eager
    assert not [r for r in caplog.records if "not replayed" in r.message]
    assert run("graph=tape", "graph.max_tapes=1")[0] == eager
    assert run("graph=tape", "graph.max_tokens=2")[0] == eager


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("attention=sdpa", "attention cannot be recorded"),
        ("ops=torch", "ops are not all of one library"),
        ("ops.silu_and_mul=torch", "torch computes mul, silu"),
        ("ops.rms_norm=torch", "torch computes .*rsqrt"),
        ("ops.linear=torch", "torch computes .*(linear|mm)"),
        ("ops.rotary_embedding=torch", "torch computes .*cat"),
        ("ops.write_kv=torch", "torch computes .*index_put"),
    ],
)
def test_a_choice_is_never_lost_in_a_replay(
    override: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    want, _ = run("graph=eager", override)
    assert run("graph=tape", override)[0] == want
    assert any("not replayed" in r.message for r in caplog.records)
    import re

    assert re.search(reason, caplog.text)


def test_a_third_library_cannot_be_recorded() -> None:
    class Vendor(TorchOps):
        def linear(self, *args: Any, **kwargs: Any) -> Any:
            return super().linear(*args, **kwargs)

    assert SelectedOps(library(ISAS[0])).recorder() is not None
    assert SelectedOps(library(ISAS[0]), linear=TorchOps()).recorder() is not None
    assert SelectedOps(library(ISAS[0]), linear=Vendor()).recorder() is None
    assert SelectedOps(TorchOps()).recorder() is None


def test_a_replay_reads_its_inputs_anew() -> None:
    ops = library(ISAS[0])
    x, weight = random(3, 64), random(64)
    recorder = ops.recorder()
    assert recorder is not None
    result, replay, reason = recorder.record(lambda: ops.rms_norm(x, weight, 1e-5))
    del recorder
    assert replay is not None, reason
    for seed in (1, 2):
        x.copy_(random(3, 64, seed=seed))
        replay()
        assert torch.equal(result, ops.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_small_and_large_tasks_wait_for_each_other(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of many threads between norms of one; with more threads than cores they sleep."""
    ops = library(ISAS[0])
    monkeypatch.setattr(ops, "threads", threads)
    x, norm = random(4, 512), random(512)
    weights = [ops.pack_linear(random(512, 512, seed=seed) / 22) for seed in range(4)]

    def step() -> torch.Tensor:
        y = x
        for weight in weights:
            y = ops.rms_norm(y, norm, 1e-5)
            y = ops.linear(ops.linear(y, weight), weight)
            y = ops.rms_norm(ops.rms_norm(y, norm, 1e-5), norm, 1e-5)
        return y

    recorder = ops.recorder()
    assert recorder is not None
    result, replay, reason = recorder.record(step)
    assert replay is not None, reason
    for seed in range(20):
        x.copy_(random(4, 512, seed=seed))
        replay()
        assert torch.equal(result, step())


def test_what_torch_computes_is_seen() -> None:
    ops, x, weight = library(ISAS[0]), random(3, 64), random(64)
    recorder = ops.recorder()
    assert recorder is not None
    _, replay, reason = recorder.record(lambda: ops.rms_norm(x, weight, 1e-5) + 1)
    assert replay is None
    assert reason == "torch computes add"


def test_a_pool_gives_memory_back_only_when_no_view_is_left() -> None:
    pool = Pool()
    first = pool.empty((4, 8), torch.bfloat16)
    address, view = first.data_ptr(), first[2:].view(-1)
    del first
    assert pool.empty((4, 8), torch.bfloat16).data_ptr() != address
    del view
    assert pool.empty((3, 9), torch.bfloat16).data_ptr() == address
    assert pool.empty((0, 5), torch.float32).shape == (0, 5)
    assert pool.empty((5,), torch.int64).data_ptr() % 64 == 0


def test_large_zeros_are_zeros() -> None:
    for shape in ((3, 5), (3, 1 << 20)):
        found = huge_zeros(shape, torch.bfloat16)
        assert found.shape == shape
        assert not found.any()
        found.fill_(1)
