"""The runner against a model that reads its context back from the cache."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.components.model_runner.driver import BLOCK, Driver, Request, request
from tests.components.model_runner.fakes import (
    VOCAB,
    EchoModel,
    Eights,
    PlanAttention,
    expected_logits,
    next_token,
)
from tests.components.sampler.rows import check_logprobs

from vllm_di.components.device.host import HostDevice
from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import BatchPlan, LayerCache, Placement, ShapePolicy
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.messages import (
    KvGroup,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    StepInput,
    StepPlan,
)
from vllm_di.components.model_runner.standard import StandardModelRunner
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.program.eager import EagerProgram
from vllm_di.components.sampler.standard import StandardSampler
from vllm_di.components.shapes.dynamic import DynamicShapes

NUM_BLOCKS = 80


class Bench:
    """A runner, with what it was made from."""

    def __init__(
        self,
        *,
        shapes: ShapePolicy | None = None,
        placement: Placement | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 256,
        max_model_len: int = 200,
    ) -> None:
        device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
        self.layout = HndLayout(device, block_size=BLOCK, dtype="auto")
        self.model = EchoModel(self.layout, max_model_len)
        self.runner = StandardModelRunner(
            device=device,
            model=self.model,
            program=EagerProgram(self.model, PlanAttention(), self.layout, EagerGraph()),
            kv_layout=self.layout,
            shapes=shapes or DynamicShapes(),
            graph=EagerGraph(),
            sampler=StandardSampler(TorchOps()),
            placement=placement or Placement(),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.runner.allocate([KvGroup([0])], NUM_BLOCKS)
        self.driver = Driver(self.runner, NUM_BLOCKS)

    @property
    def cache(self) -> LayerCache:
        return self.runner._program.caches[0]


def greedy_reference(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [DynamicShapes(), Eights()], ids=["dynamic", "padded"])
@pytest.mark.parametrize("chunk", [1, 3, BLOCK, 7, 64])
def test_every_chunk_size_reads_its_context_back(chunk: int, shapes: ShapePolicy) -> None:
    bench = Bench(shapes=shapes)
    asked = [request(p, 9) for p in prompts(1, [1, 2, BLOCK, BLOCK + 1, 23, 40, 5])]
    for one in bench.driver.run(asked, chunk=chunk, at_once=4):
        assert one.output == greedy_reference(one.prompt, 9)


def test_rows_are_padded_as_the_shapes_say_and_padding_goes_nowhere() -> None:
    bench = Bench(shapes=Eights())
    bench.cache.key.fill_(-5.0)
    one = request(prompts(2, [11])[0], 3)
    bench.driver.run([one])
    assert bench.model.batches == [16, 8, 8]
    written = int((bench.cache.key != -5.0).sum())
    assert written == 11 + 2  # the last token sampled was never run


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_schedule_gives_the_same_tokens(data: st.DataObject) -> None:
    """Chunks, company, order and preemptions as hypothesis likes."""
    bench = Bench(shapes=data.draw(st.sampled_from([DynamicShapes(), Eights()])))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    asked = [request(p, 5) for p in prompts(len(lengths), lengths)]
    driver, waiting = bench.driver, list(asked)
    for _ in range(400):
        if not (waiting or driver.live):
            break
        if waiting and (not driver.live or data.draw(st.booleans())):
            driver.live.append(waiting.pop())
        if len(driver.live) > 1 and data.draw(st.integers(0, 5)) == 0:
            driver.preempt(driver.live[-1])
        order = data.draw(st.permutations(driver.live))
        some = order[: data.draw(st.integers(1, len(order)))]
        driver.step([(one, data.draw(st.integers(1, 12))) for one in some])
    for one in asked:
        assert one.output == greedy_reference(one.prompt, 5)


def test_rows_of_the_table_are_given_back() -> None:
    bench = Bench(max_num_seqs=2)
    asked = [request(p, 2) for p in prompts(4, [5] * 9)]
    bench.driver.run(asked, at_once=2)
    assert [one.output for one in asked] == [greedy_reference(one.prompt, 2) for one in asked]


def test_a_plan_that_only_ends_sequences() -> None:
    bench = Bench(max_num_seqs=1)
    one = request([3, 4], 1)
    bench.driver.run([one])
    result = bench.runner.execute(StepInput(StepPlan(2, [], [], [one.seq_id])))
    assert result.step == 2 and result.tokens == []
    again = request([3, 4], 1)
    assert bench.driver.run([again])[0].output == one.output


def test_a_step_of_chunks_alone_samples_nothing() -> None:
    bench = Bench()
    one = request(prompts(5, [20])[0], 1)
    bench.driver.live.append(one)
    assert bench.driver.step([(one, 8)]).tokens == []
    assert bench.driver.step([(one, 8)]).tokens == []
    assert len(bench.driver.step([(one, 8)]).tokens) == 1


def test_an_unknown_sequence_to_end_is_ignored() -> None:
    bench = Bench()
    assert bench.runner.execute(StepInput(StepPlan(1, [], [], [77]))).tokens == []


# -- failures -------------------------------------------------------------------------------------


def test_a_row_of_nan_fails_alone() -> None:
    bench = Bench()
    bench.model.broken = {96}
    good, bad = request([5, 6, 7], 4), request([5, 96], 4)
    bench.driver.run([good, bad])
    assert good.output == greedy_reference([5, 6, 7], 4)
    assert bad.output == [] and "not finite" in str(bad.error)


def test_nan_inside_a_prompt_fails_the_one_that_wanted_its_logprobs() -> None:
    bench = Bench()
    bench.model.broken = {96}
    bad = request([5, 96, 8], 4, prompt_logprobs=1)
    good = request([5, 96, 8], 4)  # its last row is sound
    bench.driver.run([good, bad])
    assert good.output == greedy_reference([5, 96, 8], 4)
    assert bad.output == [] and "prompt logits" in str(bad.error)
    assert bad.prompt_logprobs == []


# -- log-probabilities ----------------------------------------------------------------------------


def check_prompt(one: Request, count: int) -> None:
    """All positions of the prompt, once each and in order."""
    position = 1
    for scored in one.prompt_logprobs:
        assert scored.start == position
        for found in scored.positions:
            check_logprobs(
                found, expected_logits(one.prompt[:position]), one.prompt[position], count
            )
            position += 1
    assert position == max(1, len(one.prompt))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prompt_logprobs_in_chunks_and_company(chunk: int) -> None:
    bench = Bench()
    lengths = [1, 2, 17, 30]
    asked = [request(p, 3, prompt_logprobs=i) for i, p in enumerate(prompts(6, lengths))]
    others = [request(p, 3) for p in prompts(7, lengths)]
    bench.driver.run([*asked, *others], chunk=chunk)
    for i, one in enumerate(asked):
        check_prompt(one, i)
        assert one.output == greedy_reference(one.prompt, 3)
    for one in others:
        assert one.prompt_logprobs == [] and one.output == greedy_reference(one.prompt, 3)


def test_tokens_generated_before_a_preemption_are_no_prompt() -> None:
    bench = Bench()
    one = request(prompts(8, [9])[0], 6, prompt_logprobs=2)
    bench.driver.live.append(one)
    for _ in range(3):
        bench.driver.step([(one, 64)])
    bench.driver.preempt(one)
    bench.driver.run([])
    check_prompt(one, 2)
    assert one.output == greedy_reference(one.prompt, 6)


def test_logprobs_of_sampled_tokens() -> None:
    bench = Bench()
    one = request([4, 5], 5, logprobs=3)
    bench.driver.run([one, request([6], 5)])
    for i, token in enumerate(one.sampled):
        assert token.logprobs is not None
        (told,), (chosen,) = token.logprobs, token.token_ids
        check_logprobs(told, expected_logits(one.tokens[: 2 + i]), chosen, 3)


# -- ranks ----------------------------------------------------------------------------------------


def test_other_ranks_run_the_same_forward_and_tell_nothing() -> None:
    first, second = Bench(), Bench(placement=Placement(rank=1, world_size=2))
    plan = StepPlan(
        1,
        [
            NewSequence(
                seq_id=1,
                params=SamplingParams(prompt_logprobs=1),
                token_ids=[7, 8, 9],
                prompt_len=3,
            )
        ],
        [ScheduledSequence(1, 0, 3, [[5]], [], samples=True, is_prefill=True)],
        [],
    )
    told, silent = (one.runner.execute(StepInput(plan)) for one in (first, second))
    assert told.tokens and told.prompt_logprobs
    assert (silent.step, silent.tokens, silent.prompt_logprobs, silent.failed) == (1, [], [], {})
    assert torch.equal(first.cache.key, second.cache.key)
    assert first.cache.key[5].flatten().tolist() == [7, 8, 9, 0]


# -- warm-up --------------------------------------------------------------------------------------


class Capturing(EagerGraph):
    """Captures by running, as a graph of an accelerator does."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def capture(self, sizes: object, run: object) -> None:
        assert isinstance(sizes, list) and callable(run)
        for size in sizes:
            run(size)
            self.sizes.append(size)


def test_warm_up_runs_the_sizes_and_leaves_the_cache_alone() -> None:
    bench = Bench()
    bench.cache.key.fill_(3.0)
    bench.runner.warm_up()
    assert bench.model.batches == [1, 16]
    assert bool((bench.cache.key == 3.0).all())
    one = request([9, 8, 7], 4)
    assert bench.driver.run([one])[0].output == greedy_reference([9, 8, 7], 4)


def test_sizes_beyond_the_longest_sequence_are_padded() -> None:
    bench = Bench(shapes=Eights(), max_model_len=21, max_num_batched_tokens=256)
    graph = Capturing()
    bench.runner._graph = graph
    bench.runner.warm_up()
    assert bench.model.batches == [8, 24, 8, 8]
    assert graph.sizes == [8]


def test_nothing_is_allocated_for_the_plan_of_a_decode_step() -> None:
    """Steps reuse the same memory; the views of an unchanged batch are the same objects."""
    bench = Bench()
    plans = []
    run = bench.runner._run

    def recorded(plan: BatchPlan) -> torch.Tensor:
        plans.append(plan)
        return run(plan)

    bench.runner._run = recorded
    bench.driver.run([request([4, 5, 6], 5), request([7], 5)])
    decode, after = plans[2:4]
    for name in ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens"):
        assert getattr(decode, name) is getattr(after, name)
