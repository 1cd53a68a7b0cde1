"""The whole engine in one process: whatever else happens, a request's tokens are its own."""

from __future__ import annotations

import pytest

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import KvCacheManager
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.sampler.standard import StandardSampler
from vllm_di.errors import ConfigError, RequestError

TINY = ["platform=cpu", "model.dtype=float32"]
PROMPTS = [
    "a",
    "hello world",
    "the quick brown fox jumps over the lazy dog " * 3,
    "0123456789" * 9,
    "once upon a time",
    "x" * 65,
    "y" * 32,
    "the quick brown fox jumps over the lazy dog " * 2,
]


def greedy(max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def tokens(llm: LLM, prompts: list[str], params: SamplingParams | None = None) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params or greedy())]


def free_blocks(llm: LLM) -> int:
    manager = llm.engine._kv  # type: ignore[attr-defined]
    assert isinstance(manager, KvCacheManager)
    return manager.num_free_blocks


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each prompt on its own, on the reference: no cache, plain torch, sdpa."""
    overrides = [*TINY, "ops=torch", "attention=sdpa", "kv_cache_manager.prefix_caching=false"]
    with LLM("tiny", overrides=overrides) as llm:
        return [tokens(llm, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["ops=torch"],
        ["attention=sdpa"],
        ["kv_cache_manager.prefix_caching=false"],
        ["scheduler.max_num_batched_tokens=64", "scheduler.max_num_seqs=3"],
        ["limits.mixed_steps=false"],
        ["limits.chunked_prefill=false", "scheduler.max_num_batched_tokens=2048"],
        ["limits.max_prefill_rows=1", "limits.null_block=true"],
        ["limits.max_batch_context=150"],
        ["kv_layout.block_size=16"],
        ["scheduler.policy=priority"],
        ["executor=multiprocess"],
        ["executor=multiprocess", "executor.tensor_parallel_size=2"],
        [
            "executor=multiprocess",
            "executor.tensor_parallel_size=2",
            "communicator=shared_memory",
        ],
        ["ops.rms_norm=torch", "ops.linear=torch"],
    ],
    ids=" ".join,
)
def test_a_mixed_batch_equals_each_alone(overrides: list[str], alone: list[list[int]]) -> None:
    with LLM("tiny", overrides=[*TINY, *overrides]) as llm:
        before = free_blocks(llm)
        assert tokens(llm, PROMPTS) == alone
        assert tokens(llm, PROMPTS[::-1]) == alone[::-1]  # now from the prefix cache, if it is on
        assert free_blocks(llm) == before


def test_preempted_equals_not_preempted(alone: list[list[int]]) -> None:
    overrides = ["model.max_model_len=192", "worker.num_blocks=8"]
    with LLM("tiny", overrides=[*TINY, *overrides]) as llm:
        assert tokens(llm, PROMPTS) == alone
        stats = llm.engine.step().stats
        assert stats.num_preemptions > 0
        assert free_blocks(llm) == 8


def test_prefix_cache_is_used_and_salted() -> None:
    with LLM("tiny", overrides=TINY) as llm:
        long = "the same beginning, again and again and again"
        first, second = (llm.generate(long + end, greedy(4))[0] for end in "ab")
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens == 32
        llm.engine.reset_prefix_cache()
        assert llm.generate(long + "c", greedy(4))[0].num_cached_tokens == 0


def test_seeds_repeat_in_any_company() -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True, n=2)
    with LLM("tiny", overrides=TINY) as llm:
        alone = llm.generate("hello", params)[0]
        crowd = llm.generate([*PROMPTS, "hello"], [greedy()] * 8 + [params])[-1]
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in crowd.outputs]
        assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


def test_stop_strings_ids_and_lengths() -> None:
    with LLM("tiny", overrides=TINY) as llm:
        free = llm.generate("hello", greedy(20))[0].outputs[0]
        third = free.token_ids[2]
        stopped = SamplingParams(
            temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[third]
        )
        out = llm.generate("hello", stopped)[0].outputs[0]
        first = free.token_ids.index(third)
        assert (out.token_ids, out.finish_reason) == (free.token_ids[: first + 1], "stop")
        assert out.stop_reason == third
        later = SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            stop_token_ids=[third],
            min_tokens=first + 2,
        )
        assert len(llm.generate("hello", later)[0].outputs[0].token_ids) > first + 1
        text = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[free.text[3:6]])
        cut = llm.generate("hello", text)[0].outputs[0]
        assert cut.text == free.text[: free.text.index(free.text[3:6])]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", free.text[3:6])
        assert free.finish_reason == "length"
        assert "".join(llm.stream("hello", greedy(20))) == free.text


def test_logprobs_agree_with_each_other() -> None:
    params = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    with LLM("tiny", overrides=TINY) as llm:
        done = llm.generate("hello world", params)[0]
        assert done.prompt_logprobs is not None
        assert len(done.prompt_logprobs) == len(done.prompt_token_ids)
        whole = [*done.prompt_token_ids, *done.outputs[0].token_ids]
        again = llm.generate(
            [whole], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
        )[0]
        assert again.prompt_logprobs is not None
        start = len(done.prompt_token_ids)
        assert done.outputs[0].logprobs is not None
        for place, entry in enumerate(done.outputs[0].logprobs):
            token = whole[start + place]
            scored = again.prompt_logprobs[start + place]
            assert scored is not None
            assert scored[token].logprob == pytest.approx(entry[token].logprob, abs=1e-4)
            assert scored[token].rank == entry[token].rank == 1


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty"),
        ("x" * 3000, {}, "2048"),
        ([1, 999], {}, "999"),
        ([-1], {}, "-1"),
        ("a", {"stop_token_ids": [400]}, "400"),
        ("a", {"logit_bias": {400: 1.0}}, "400"),
        ("a", {"allowed_token_ids": [-3]}, "-3"),
        ("a", {"structured_output": {"type": "json_object"}}, "structured_output"),
        ("a", {"max_tokens": 5000}, "2048"),
    ],
)
def test_a_bad_request_leaves_the_engine_as_it_was(
    prompt: str | list[int], params: dict[str, object], words: str
) -> None:
    with LLM("tiny", overrides=TINY) as llm:
        before = free_blocks(llm)
        with pytest.raises(RequestError, match=words):
            llm.generate(["fine", prompt], SamplingParams(**params))  # type: ignore[arg-type]
        assert free_blocks(llm) == before
        assert not llm.engine.has_work()
        assert len(tokens(llm, ["fine"], greedy(3))[0]) == 3


@pytest.mark.parametrize(
    "value",
    [
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": float("inf")},
        {"top_k": -2},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"presence_penalty": 9},
        {"n": 0},
        {"max_tokens": 0},
        {"min_tokens": 5, "max_tokens": 4},
        {"logprobs": 21},
        {"stop": [""]},
        {"seed": 2**64},
        {"logit_bias": {1: float("nan")}},
        {"allowed_token_ids": []},
        {"bad_words": [" "]},
    ],
    ids=str,
)
def test_hostile_sampling_values_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**value)  # type: ignore[arg-type]
    assert caught.value.param in value


def test_too_little_cache_is_refused_with_figures() -> None:
    with pytest.raises(ConfigError, match=r"room for 3 blocks .*needs 64 .*raise worker"):
        LLM("tiny", overrides=[*TINY, "worker.num_blocks=3"])


def test_parts_are_handed_in_by_keyword() -> None:
    from vllm_di.components.attention.sdpa import SdpaAttention
    from vllm_di.components.device.host import HostDevice
    from vllm_di.components.kv_layout.hnd import HndLayout

    class Counting(SdpaAttention):
        calls = 0

        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            Counting.calls += 1
            return super().forward(*args, **kwargs)

    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    layout = HndLayout(device, block_size=32, dtype="auto")
    with LLM("tiny", overrides=TINY, kv_layout=layout, attention=Counting(layout)) as llm:
        llm.generate("hello", greedy(3))
    assert Counting.calls >= 3 * 2
    with pytest.raises(TypeError, match="no slot 'atention'; did you mean 'attention'"):
        LLM("tiny", overrides=TINY, atention=1)


def test_a_sampler_that_fails_costs_its_step_and_no_more(alone: list[list[int]]) -> None:
    class Fragile(StandardSampler):
        def sample(self, logits, rows):  # type: ignore[no-untyped-def]
            if any(row.params.seed == 13 for row in rows):
                raise ZeroDivisionError("thirteen")
            return super().sample(logits, rows)

    bad = SamplingParams(temperature=0, seed=13, max_tokens=5)
    with LLM("tiny", overrides=TINY, sampler=Fragile(SelectedOps(TorchOps()))) as llm:
        with pytest.raises(RequestError, match="sampling failed: ZeroDivisionError: thirteen"):
            llm.generate(PROMPTS[:1], bad)
        assert tokens(llm, PROMPTS[:2]) == alone[:2]


def test_parameters_that_leave_no_token_are_the_requests_fault() -> None:
    params = SamplingParams(allowed_token_ids=[65], stop_token_ids=[65], min_tokens=2, max_tokens=4)
    with LLM("tiny", overrides=TINY) as llm:
        with pytest.raises(RequestError, match="leave none") as caught:
            llm.generate("hello", params)
        assert len(tokens(llm, ["fine"], greedy(3))[0]) == 3
    error = caught.value
    assert (error.status, error.param, error.code) == (400, "allowed_token_ids", "no_token_left")
