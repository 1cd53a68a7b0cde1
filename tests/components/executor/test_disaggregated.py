"""Prompts on one side, tokens from the other: the tokens are those of one worker alone, whatever
crosses between them, and nothing is left behind."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.components.executor.nixl import needs_nixl

from vllm_di.components.executor.disaggregated import DisaggregatedExecutor
from vllm_di.components.executor.lanes import Lane
from vllm_di.components.messages import EngineRequest, SamplingParams, TokenOutput
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.slots import EngineContainer
from vllm_di.errors import ConfigError, EngineDeadError

TINY = ["model=tiny", "model.dtype=float32", "model.max_model_len=256", "ops=torch"]
SPLIT = ["platform=split_cpu_cpu", *TINY, "worker.num_blocks=160"]
UNLIKE = ["prefill.attention=sdpa", "prefill.kv_layout=nhd", "prefill.kv_layout.block_size=16"]
"""Blocks of 16 and 32 tokens, heads outside and inside."""
CHUNKS = ["scheduler.max_num_batched_tokens=48", "scheduler.max_num_seqs=8"]


class Served:
    """An engine whose requests a test adds, aborts and follows."""

    def __init__(self, container: Any) -> None:
        self.engine, self.executor = container.engine(), container.executor()
        self.kv, self.scheduler = container.kv_cache_manager(), container.scheduler()
        self.tokens: dict[str, list[int]] = {}
        self.outputs: dict[str, TokenOutput] = {}

    def add(self, name: str, prompt: list[int], **params: Any) -> None:
        given = {"temperature": 0, "max_tokens": 8, "ignore_eos": True} | params
        self.engine.add(
            EngineRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**given))
        )
        self.tokens[name] = []

    def step(self) -> None:
        for output in self.engine.step().outputs:
            assert output.error is None, output.error
            self.tokens[output.request_id] += output.token_ids
            self.outputs[output.request_id] = output

    def finish(self) -> dict[str, list[int]]:
        while self.engine.has_work():
            self.step()
        return self.tokens

    @property
    def is_empty(self) -> bool:
        """Whether no block is held, and no side remembers a sequence."""
        self.add("last", [1, 2])  # its plan tells the sides what has ended
        self.finish()
        lanes = self.executor._lanes
        assert not any(lane.parts or lane.num_queued_tokens for lane in lanes)
        assert len(self.executor._book.live) <= 1
        return bool(self.kv.num_free_blocks == self.scheduler._usable)


@contextmanager
def served(*overrides: str) -> Iterator[Served]:
    assembly = assemble(list(overrides))
    with opened(EngineContainer, assembly, launcher=Launcher(assembly)) as container:
        yield Served(container)


def prompts(count: int, seed: int = 0) -> dict[str, list[int]]:
    """Of one token to most of the context, half of them with a beginning in common."""
    chance = random.Random(seed)
    common = [chance.randrange(300) for _ in range(100)]
    found = {}
    for index in range(count):
        own = [chance.randrange(300) for _ in range(chance.choice([1, 2, 31, 32, 33, 70, 120]))]
        found[f"r{index}"] = common[: chance.choice([32, 50, 64, 100])] + own if index % 2 else own
    return found


def alone(asked: dict[str, list[int]], *overrides: str, **params: Any) -> dict[str, list[int]]:
    with served("platform=cpu", *TINY, "worker.num_blocks=160", *overrides) as one:
        for name, prompt in asked.items():
            one.add(name, prompt, **params)
        return one.finish()


@pytest.fixture(scope="module")
def want() -> dict[str, list[int]]:
    """Of ``prompts(16)``, and of each with its answer behind it under ``again NAME``."""
    with served("platform=cpu", *TINY, "worker.num_blocks=160") as one:
        for name, prompt in prompts(16).items():
            one.add(name, prompt)
        first = dict(one.finish())
        for name, prompt in prompts(16).items():
            one.add(f"again {name}", prompt + first[name], max_tokens=2)
        return one.finish()


@pytest.mark.parametrize(
    "overrides",
    [
        UNLIKE,
        [*UNLIKE, *CHUNKS],
        [*UNLIKE, *CHUNKS, "executor.prefill_replicas=2"],
        ["prefill.kv_layout.block_size=64", "decode.kv_layout.block_size=48", *CHUNKS],
        [*CHUNKS, "worker.num_blocks=10", "kv_transfer=tcp"],  # few blocks: some are preempted
        pytest.param([*UNLIKE, *CHUNKS, "kv_transfer=nixl"], marks=needs_nixl, id="nixl"),
    ],
)
def test_tokens_are_those_of_one_worker(overrides: list[str], want: dict[str, list[int]]) -> None:
    with served(*SPLIT, *overrides) as split:
        for name, prompt in prompts(16).items():
            split.add(name, prompt)
        found = split.finish()
        assert found == {name: want[name] for name in found}
        if "worker.num_blocks=10" in overrides:
            assert split.scheduler.stats().num_preemptions
        # once more: prompts find what the decode side wrote, and the other way round
        for name, prompt in prompts(16).items():
            split.add(f"again {name}", prompt + want[name], max_tokens=2)
        assert split.finish() == want
        assert split.is_empty


def test_blocks_that_decoding_wrote_cross_to_a_prompt() -> None:
    first = list(range(40))
    with served(*SPLIT, *UNLIKE) as split:
        split.add("first", first, max_tokens=60)
        answer = split.finish()["first"]
        split.add("next", [*first, *answer, *range(50)], max_tokens=3)
        split.finish()
        assert split.outputs["next"].request_id == "next"
        ledger, lane = split.executor._book.ledger, split.executor._prefill[0]
        assert sum(ledger.tokens(lane.index, block) for block in range(80)) >= 96
    whole = {"next": [*first, *answer, *range(50)]}
    assert split.tokens["next"] == alone(whole, max_tokens=3)["next"]


def test_what_a_prompt_cannot_take_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the engine: the prompt runs where the blocks are."""
    take, first = Lane.take, list(range(40))

    def broken(lane: Lane, *given: Any) -> str:
        return "the network is down" if lane.index else take(lane, *given)

    with served(*SPLIT, *UNLIKE) as split:
        split.add("first", first, max_tokens=60)
        prompt = [*first, *split.finish()["first"], *range(50)]
        monkeypatch.setattr(Lane, "take", broken)
        split.add("next", prompt, max_tokens=3)
        split.finish()
        [prefill] = split.executor._prefill
        assert str(prefill.error) == "prefill 0 cannot take what decode has: the network is down"
        assert split.is_empty
    assert split.tokens["next"] == alone({"next": prompt}, max_tokens=3)["next"]


@pytest.mark.parametrize("window", [20, 48])
def test_groups_of_layers_cross_apart(window: int) -> None:
    """A group of a window and one without; the window leaves blocks while the prompt still runs."""
    model = [
        f"model.sliding_window={window}",
        "model.layer_types=[sliding_attention,full_attention]",
    ]
    asked = prompts(8, seed=3)
    alone_too = alone(asked, *model, max_tokens=40)
    with served(*SPLIT, *UNLIKE, *CHUNKS, *model) as split:
        assert len(split.engine.report.kv_groups) == 2
        for name, prompt in asked.items():
            split.add(name, prompt, max_tokens=40)
        assert split.finish() == alone_too
        assert split.is_empty


def test_a_dtype_that_loses_bits_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with served(*SPLIT, *UNLIKE, "decode.kv_layout.dtype=bfloat16") as split:
        split.add("one", [1] * 40)
        assert len(split.finish()["one"]) == 8
    words = "loses bits where it crosses from prefill (float32) to decode (bfloat16)"
    assert [words in message for message in caplog.messages].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_heads_are_joined_and_split(
    role: str, want: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on one side, one on the other."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)
    ranks = [
        f"executor.{role}_tensor_parallel_size=2",
        f"{role}.communicator=torch_distributed",
    ]
    with served(*SPLIT, *UNLIKE, *CHUNKS, *ranks) as split:
        for name, prompt in prompts(16).items():
            split.add(name, prompt)
        found = split.finish()
        assert found == {name: want[name] for name in found}
        assert split.is_empty


def test_sampling_and_scores_do_not_change() -> None:
    params: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3, "logprobs": 2},
        {"prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"structured_output": {"guided_regex": "[ab]{2}(cd)*"}, "ignore_eos": False},
    ]
    answers = []
    for overrides in (["platform=cpu", *TINY, "worker.num_blocks=160"], [*SPLIT, *UNLIKE, *CHUNKS]):
        with served(*overrides) as one:
            for (name, prompt), given in zip(prompts(5, seed=2).items(), params, strict=True):
                one.add(name, prompt, **given)
            first: list[TokenOutput] = []
            while one.engine.has_work():
                first += one.engine.step().outputs
            tokens: dict[str, list[int]] = {name: [] for name in one.tokens}
            scores = None
            for output in first:
                tokens[output.request_id] += output.token_ids
                scores = output.prompt_logprobs or scores
            answers.append((tokens, [s.token_ids for s in scores or []]))
    assert answers[0] == answers[1] and answers[0][1]


def mixed(split: Served, want: dict[str, list[int]], num_requests: int, seed: int) -> None:
    """Requests come and are aborted while others run; what is not aborted is answered in full."""
    chance = random.Random(seed)
    source = prompts(16)
    aborted: set[str] = set()
    names = itertools.islice(itertools.cycle(source), num_requests)
    waiting = [(f"{name}/{index}", source[name]) for index, name in enumerate(names)]
    waiting.reverse()
    while waiting or split.engine.has_work():
        for _ in range(min(len(waiting), chance.randrange(4))):
            split.add(*waiting.pop())
        if chance.random() < 0.3 and split.tokens:
            name = chance.choice(list(split.tokens))
            if split.outputs.get(name) is None or split.outputs[name].finish_reason is None:
                split.engine.abort(name)
                aborted.add(name)
        if split.engine.has_work():
            split.step()
    for name, tokens in split.tokens.items():
        if name not in aborted:
            assert tokens == want[name.partition("/")[0]], name
    assert len(aborted) > num_requests // 20 and split.is_empty


def test_aborts_leave_nothing(want: dict[str, list[int]]) -> None:
    replicas = "executor.prefill_replicas=2"
    with served(*SPLIT, *UNLIKE, *CHUNKS, "worker.num_blocks=40", replicas) as split:
        mixed(split, want, 60, seed=1)


def kill_one(split: Served, name: str) -> None:
    peer = next(p for p in split.executor.processes() if p.name.startswith(name))
    os.kill(peer.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transfer", ["shared_memory", "tcp", pytest.param("nixl", marks=needs_nixl)]
)
def test_a_prompt_worker_that_dies_costs_no_answer(
    transfer: str, want: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)
    replicas = 2 if transfer == "tcp" else 1
    processes = ["executor.processes=true", f"executor.prefill_replicas={replicas}"]
    with served(*SPLIT, *CHUNKS, *processes, f"kv_transfer={transfer}") as split:
        assert isinstance(split.executor, DisaggregatedExecutor)
        for left in reversed(range(replicas)):
            for name, prompt in prompts(16).items():
                split.add(f"{name}/{left}", prompt)
            for _ in range(3):
                split.step()
            kill_one(split, "prefill")
            found = split.finish()
            for name in prompts(16):
                assert found[f"{name}/{left}"] == want[name]
            assert len(split.executor.processes()) == 1 + left
        split.executor.check_alive()
        mixed(split, want, 12, seed=2)  # on the decode side alone
        kill_one(split, "decode")
        split.add("late", [1, 2, 3])
        with pytest.raises(EngineDeadError, match="decode"):
            split.finish()
        with pytest.raises(EngineDeadError, match="decode"):
            split.executor.check_alive()


@pytest.mark.parametrize("transfer", ["shared_memory", pytest.param("nixl", marks=needs_nixl)])
def test_processes_and_the_end_of_one(
    transfer: str, want: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)
    few = dict(list(prompts(16).items())[:5])
    processes = ["executor.processes=true", f"kv_transfer={transfer}"]
    with served(*SPLIT, *processes, *CHUNKS) as split:
        for name, prompt in few.items():
            split.add(name, prompt)
        split.step()
        split.step()
        kill_one(split, "prefill")
        found = split.finish()
        assert found == {name: want[name] for name in few}
        assert [peer.name for peer in split.executor.processes()] == ["decode stage 0"]
        split.executor.check_alive()
        assert split.is_empty


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kv_transfer=none"], "kv_transfer=none moves no cache.*take kv_transfer=shared_memory"),
        (["decode.worker=standard"], r"decode\.worker: .*take decode\.worker=handover"),
        (["scheduler=bounded"], r"max_step_ms \(100\) bounds steps that prompts share"),
        (["decode.model.max_model_len=128"], r"max_model_len comes out as 128, but .* as 256"),
        (["kv_transfer=tcp", "kv_transfer.bind=0.0.0.0"], "listens everywhere"),
        (["kv_transfer=tcp", "kv_transfer.bind=10.0.0.1"], "other machines: set secret_file"),
        (["kv_transfer=tcp", "kv_transfer.bind=lo"], "'lo' is no IP address"),
        (["kv_transfer=tcp", "kv_transfer.secret_file=/absent"], "No such file"),
        (
            ["platform=cpu", "kv_transfer=tcp", "executor=disaggregated"],
            "executor=disaggregated: .* roles prefill, decode, and platform=cpu names no roles",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words), served(*SPLIT, *overrides):
        pass
