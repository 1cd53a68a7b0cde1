"""Policies with static shapes: what they add, what they warm up, what they refuse."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.components.model_runner.fakes import CountingModel
from tests.components.shapes.plans import of_shape, plan

from vllm_di import LLM, SamplingParams
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import PlanShape, ShapePolicy
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.limits.standard import StandardLimits
from vllm_di.components.shapes.grid import GridShapes
from vllm_di.components.shapes.token_buckets import TokenBuckets
from vllm_di.errors import ConfigError

GRID: dict[str, Any] = {
    "decode_seqs": [1, 4, 8],
    "prefill_seqs": [1, 2],
    "prefill_queries": [4, 16],
    "columns": [2, 4, 16],
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
}
LIMITS: dict[str, Any] = {
    "mixed_steps": False,
    "chunked_prefill": True,
    "max_prefill_rows": 2,
    "max_batch_context": None,
    "null_block": False,
    "drafts": False,
}
BUCKETS: dict[str, Any] = {"sizes": [4, 16], "max_num_seqs": 8, "max_num_batched_tokens": 16}
MOST = PlanShape(tokens=16, rows=16, seqs=8, columns=16, queries=16)


def made(kind: type, keys: dict[str, Any], limits: dict[str, Any] | None = None) -> ShapePolicy:
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    policy: ShapePolicy = kind(
        model=CountingModel(max_model_len=256),
        kv_layout=HndLayout(device, block_size=16, dtype="auto"),
        limits=StandardLimits(**(LIMITS | (limits or {}))),
        **keys,
    )
    return policy


def test_what_is_added_touches_no_block() -> None:
    for null_block, slot in ((False, -1), (True, 0)):
        policy = made(GridShapes, GRID, {"null_block": null_block})
        found = policy.pad(plan([3, 7], columns=3))
        assert found.shape == found.padded_to == PlanShape(32, 2, 2, 4, 16)
        assert found.slot_mapping.tolist() == [*range(100, 110), *[slot] * 22]
        assert found.query_lens_host == [3, 7] and found.query_start.tolist() == [0, 3, 10]
        assert found.block_table.tolist() == [[1, 1, 1, 0]] * 2
    found = policy.pad(plan([1] * 5))
    assert found.shape == PlanShape(tokens=8, rows=8, seqs=8, columns=2, queries=1)
    assert found.query_start.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert found.seq_lens.tolist() == found.seq_lens_host == [6] * 5 + [0] * 3
    assert found.logits_rows.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


@pytest.mark.parametrize(("kind", "keys"), [(GridShapes, GRID), (TokenBuckets, BUCKETS)])
def test_every_step_within_the_limits_has_a_shape_that_was_warmed_up(
    kind: type, keys: dict[str, Any]
) -> None:
    policy, choose = made(kind, keys), random.Random(0)
    warm = {one.shape for one in policy.warm_up_plans(MOST, of_shape)}
    assert 0 < len(warm) < 100
    seen = set()
    for _ in range(2000):
        if choose.random() < 0.5:
            queries = [1] * choose.randint(1, 8)
        else:
            queries = [choose.randint(1, 8) for _ in range(choose.randint(1, 2))]
        rows = choose.choice([0, len(queries), sum(queries)])
        columns = choose.randint(-(-max(queries) // 16), 16)
        found = policy.pad(plan(queries, rows=rows, columns=columns))
        seen.add(found.shape)
        assert found.shape in warm
    assert len(seen) > len(warm) / 2, "shapes that nothing needs are compiled"


@pytest.mark.parametrize(
    ("keys", "limits", "message"),
    [
        ({}, {"mixed_steps": True}, "set limits.mixed_steps=false"),
        ({}, {"drafts": True}, "set limits.drafts=false"),
        ({}, {"max_prefill_rows": 3}, "prefill_seqs: a step may have 3.*max_prefill_rows=2"),
        ({}, {"max_prefill_rows": None}, "prefill_seqs: a step may have 8"),
        ({"max_num_seqs": 9}, {}, "decode_seqs: a step may have 9.*lower scheduler.max_num_seqs"),
        ({"max_num_batched_tokens": 17}, {}, "prefill_queries: .* 17.*max_num_batched_tokens"),
        ({"columns": [2, 15]}, {}, "columns: a step may have 16.*lower model.max_model_len"),
    ],
)
def test_limits_that_lead_beyond_the_largest_shape_are_refused(
    keys: dict[str, Any], limits: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        made(GridShapes, GRID | keys, limits)


def test_the_place_of_a_refusal_is_what_was_typed() -> None:
    wanted = rf"command line: {TOKENS}=4096: shapes: sizes: a step may have 4096 tokens"
    with (
        pytest.raises(ConfigError, match=wanted),
        LLM("tiny", overrides=[*SMALL, "shapes=token_buckets", f"{TOKENS}=4096"]),
    ):
        pass


def test_a_plan_beyond_the_largest_shape_is_never_cut() -> None:
    for policy in (made(GridShapes, GRID), made(TokenBuckets, BUCKETS)):
        with pytest.raises(ValueError, match="beyond the largest size"):
            policy.pad(plan([17]))


TOKENS = "scheduler.max_num_batched_tokens"
SMALL = ("platform=cpu", "model=tiny", "model.dtype=float32", "device.threads=1")
STATIC = {
    "grid": [
        *("shapes=grid", "limits.mixed_steps=false", "limits.drafts=false"),
        *("limits.max_prefill_rows=2", "shapes.prefill_seqs=[1,2]", "shapes.decode_seqs=[2,8]"),
        *("shapes.prefill_queries=[8,32]", "shapes.columns=[4,128]"),
    ],
    "token_buckets": ["shapes=token_buckets", "shapes.sizes=[8,32]"],
}


def answers(*overrides: str) -> list[Any]:
    sizes = (f"{TOKENS}=32", "scheduler.max_num_seqs=8")
    prompts = ["a", "hello there", "x" * 70, "the quick brown fox", "z" * 5]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    scored = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    with LLM("tiny", overrides=[*SMALL, *sizes, *overrides]) as llm:
        found = [*llm.generate(prompts, greedy), *llm.generate(prompts[:2], scored)]
        return [one.outputs[0].token_ids for one in found]


@pytest.mark.filterwarnings("ignore:.*stand-in")
@pytest.mark.parametrize("attention", ["paged", "sdpa"])
def test_tokens_do_not_depend_on_padding(attention: str) -> None:
    wanted = answers(f"attention={attention}")
    for overrides in STATIC.values():
        assert answers(f"attention={attention}", *overrides) == wanted
        null_block = "limits.null_block=true"
        assert answers(f"attention={attention}", null_block, *overrides) == wanted


def test_exported_metadata_of_a_padded_plan_has_the_sizes_of_the_shape() -> None:
    from vllm_di.components.attention.sdpa import SdpaAttention

    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    build = SdpaAttention(HndLayout(device, block_size=16, dtype="auto")).export()
    policy = made(GridShapes, GRID)

    def sizes(queries: list[int]) -> dict[str, torch.Size]:
        metadata = build(policy.pad(plan(queries)))
        return {name: getattr(metadata, name).shape for name in metadata.__dataclass_fields__}

    assert sizes([5, 1]) == sizes([13, 3]) == sizes([7, 8])
