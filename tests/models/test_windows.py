"""Sliding windows through the whole engine: blocks that a window has left go to other sequences,
and every token is still transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.checkpoints import make

from vllm_di import LLM, SamplingParams
from vllm_di.components.kv_groups import Groups, group_layers
from vllm_di.components.messages import KvSpec

PROMPTS = [[(7 * i * i + 3 * i + 11 * n) % 97 + 1 for i in range(length)] for n, length in
           enumerate((70, 9, 41, 70))]  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=paged", "graph=tape"],
        ["attention=sdpa", "ops=torch", "graph=eager"],
        ["platform=openvino", "attention=sdpa"],
        ["executor=multiprocess", "executor.tensor_parallel_size=2", "communicator=shared_memory"],
    ],
)
def test_gemma3_in_a_small_cache(overrides: list[str], tmp_path: Path) -> None:
    theirs = make("gemma3", tmp_path, vocab_size=300, max_position_embeddings=128)
    with torch.no_grad():
        want = [
            theirs.generate(
                torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False
            )[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]
    small = ["scheduler.max_num_batched_tokens=24", "scheduler.max_num_seqs=3"]
    size = (
        ["kv_layout=openvino"] if "platform=openvino" in overrides else ["kv_layout.block_size=8"]
    )
    with LLM(
        str(tmp_path),
        overrides=["tokenizer=bytes", "model.dtype=float32", *small, *size, *overrides],
    ) as llm:
        for _ in range(2):  # the second time from what is left of the prefix cache
            answers = llm.generate(PROMPTS, GREEDY)
            assert [answer.outputs[0].token_ids for answer in answers] == want


def specs(count: int, every: int, window: int = 512) -> list[KvSpec]:
    """Layers of which each ``every``th sees all tokens."""
    return [
        KvSpec(layer=i, num_kv_heads=1, head_size=8)
        if i % every == every - 1
        else KvSpec(layer=i, num_kv_heads=1, head_size=8, kind="sliding", window=window)
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [12, 24, 26, 34, 48, 62])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_groups_hold_each_layer_once_and_leave_little_unused(count: int, num_stages: int) -> None:
    layers = specs(count, 6)
    cut = -(-count // num_stages)
    stages = [layers[i : i + cut] for i in range(0, count, cut)]
    groups = group_layers(stages)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(count))
    places = sum(len(Groups(stage, groups).pool) for stage in stages)
    assert places * len(groups) <= 1.16 * count
    for stage in stages:
        parts = Groups(stage, groups)
        used = list(zip(parts.of_layer, parts.places, strict=True))
        assert len(set(used)) == len(used)  # no two layers of a group share tensors


def test_one_kind_of_layers_is_one_group() -> None:
    (group,) = group_layers([specs(5, 1)])
    assert group.window is None
    (group,) = group_layers([specs(5, 99, window=7)])
    assert group.window == 7


def test_unlike_heads_keep_their_blocks_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    layers = [*specs(5, 6), KvSpec(layer=5, num_kv_heads=2, head_size=8)]
    (group,) = group_layers([layers])
    assert group.window is None and "keep the blocks" in caplog.text
