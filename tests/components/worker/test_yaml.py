"""The options of the worker's slots as users write them."""

from __future__ import annotations

import pytest

from vllm_di.components.executor.inline import start_alone
from vllm_di.components.interfaces import Placement
from vllm_di.components.messages import LimitsReport
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError

TINY = ["platform=cpu", "model=tiny", "model.dtype=float32", "ops=torch"]


def test_the_defaults_load_and_restrict_nothing() -> None:
    with opened(WorkerContainer, assemble(TINY), placement=Placement()) as container:
        assert start_alone(container.worker()).limits == LimitsReport()


def test_the_worker_follows_the_scheduler() -> None:
    """64 sequences of 2,048 tokens in blocks of 32 by default; two of 64 tokens when told."""
    small = ["scheduler.max_num_seqs=2", "model.max_model_len=64", "kv_layout.block_size=32"]
    assembly = assemble([*TINY, *small])
    with opened(WorkerContainer, assembly, placement=Placement()) as container:
        assert start_alone(container.worker()).num_blocks == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("device.threads=0", ["device.threads", ">= 1"]),
        ("device.memory_budget=lots", ["memory_budget", "'lots'"]),
        ("device.default_dtype=float23", ["float23", "float32"]),
        ("limits.max_prefill_rows=0", ["limits.max_prefill_rows", ">= 1"]),
        ("limits.null_block=maybe", ["limits.null_block", "bool"]),
        ("worker.memory_fraction=1.5", ["worker.memory_fraction", "<= 1"]),
        ("worker.num_blocks=0", ["worker.num_blocks", ">= 1"]),
        ("worker.kv_cache_memory=huge", ["kv_cache_memory", "'huge'"]),
        ("model_runner.max_num_seqs=0", ["model_runner.max_num_seqs", ">= 1"]),
        ("+worker.blocks=3", ["worker.blocks"]),
        ("+sampler.top_k=3", ["sampler.top_k"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(override: str, words: list[str]) -> None:
    with (
        pytest.raises(ConfigError) as caught,
        opened(WorkerContainer, assemble([*TINY, override]), placement=Placement()),
    ):
        pass
    assert all(word in str(caught.value) for word in words), str(caught.value)
