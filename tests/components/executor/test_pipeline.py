"""Stages of a pipeline: the tokens of the whole model, overlapped steps, and failures that name
their stage."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.components.scheduler.fakes import report
from tests.containers.two_platforms import config_dir

from vllm_di import LLM, SamplingParams
from vllm_di.components.executor.pipeline import PipelineExecutor
from vllm_di.components.interfaces import Placement, Worker, WorkerLauncher
from vllm_di.components.messages import (
    CacheSize,
    HiddenStates,
    KvGroup,
    SampledTokens,
    StepInput,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.errors import ConfigError, EngineDeadError

PROMPTS = ["a", "hello world", "x" * 70, "hello world again"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, seed=3, max_tokens=8, repetition_penalty=1.2, logprobs=2)


def run(platform: str, folder: Path, *overrides: str) -> list[Any]:
    chosen = [f"platform={platform}", "model.dtype=float32", *overrides]
    with LLM("tiny", overrides=chosen, config_dirs=[config_dir(folder)]) as llm:
        answers = llm.generate(PROMPTS, GREEDY) + llm.generate(PROMPTS[:2], DRAWN)
        scored = llm.generate(PROMPTS[1], SamplingParams(max_tokens=1, prompt_logprobs=1))[0]
        found = [a.outputs[0].token_ids for a in answers]
        told = scored.prompt_logprobs
        assert told is not None
        best = [sorted(entry) for entry in told if entry is not None]
    return [*found, best]


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run("cpu", tmp_path_factory.mktemp("conf"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("executor.depth=1",),
        ("scheduler.max_num_batched_tokens=16", "scheduler.max_num_seqs=3"),
        ("attention=sdpa", "stages.0.ops.rms_norm=torch"),
        ("stages.1.ops=cpu", "stages.1.attention=paged"),
        ("executor.processes=true",),
    ],
)
def test_two_platforms_give_the_tokens_of_one(
    overrides: tuple[str, ...], want: list[Any], tmp_path: Path
) -> None:
    assert run("two", tmp_path, *overrides) == want


def test_a_stage_that_dies_is_named(tmp_path: Path) -> None:
    overrides = ["platform=two", "executor.processes=true"]
    with LLM("tiny", overrides=overrides, config_dirs=[config_dir(tmp_path)]) as llm:
        children = psutil.Process().children()
        workers = [c for c in children if '"stage":1' in " ".join(c.cmdline())]
        assert len(workers) == 1
        os.kill(workers[0].pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="stage 1 was killed by signal 9"):
            llm.generate("a", GREEDY)
    assert not [c for c in psutil.Process().children() if "worker_process" in str(c.cmdline())]


class FakeStage(Worker):
    """Adds its number to what the stage before said; stage 1 may have troubles."""

    def __init__(self, stage: int, how: str, meeting: threading.Barrier) -> None:
        self.stage, self.how, self.meeting = stage, how, meeting
        self.threads: set[int] = set()

    def load(self) -> WorkerReport:
        self.threads.add(threading.get_ident())
        if self.how == "bad config" and self.stage == 1:
            raise ConfigError("conf/x.yaml:3: no")
        return report()

    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        return CacheSize(20 - self.stage, 8)

    def allocate(self, num_blocks: int) -> None:
        assert num_blocks == 19

    def execute(self, step: StepInput) -> StepResult:
        plan, hidden = step.plan, step.hidden
        self.threads.add(threading.get_ident())
        if self.how == "raises" and self.stage == 1:
            raise RuntimeError("boom")
        if self.how == "meets" and (self.stage, plan.step) in ((1, 1), (0, 2)):
            self.meeting.wait(20)  # each waits for the other: both stages are at work
        data = b"%d" % self.stage if hidden is None else hidden.data + b"%d" % self.stage
        if self.stage == 0:
            return StepResult(plan.step, [], hidden=HiddenStates(1, 1, "float32", data))
        return StepResult(plan.step, [SampledTokens(1, [int(data) + 100 * plan.step])])


class FakeLauncher(WorkerLauncher):
    num_stages = 2

    def __init__(self, how: str = "works") -> None:
        self.how, self.meeting = how, threading.Barrier(2)
        self.open_now: list[int] = []
        self.workers: list[FakeStage] = []

    @contextmanager
    def _opened(self, stage: int) -> Iterator[Worker]:
        self.open_now.append(stage)
        self.workers.append(FakeStage(stage, self.how, self.meeting))
        yield self.workers[-1]
        self.open_now.remove(stage)

    def open(self, placement: Placement) -> AbstractContextManager[Worker]:
        assert placement == Placement(stage=placement.stage, num_stages=2)
        return self._opened(placement.stage)

    def command(self, placement: Placement, address: str) -> tuple[list[str], bytes]:
        raise AssertionError("not in a process")


def executor(launcher: WorkerLauncher, depth: int | None = None) -> PipelineExecutor:
    return PipelineExecutor(
        launcher, processes=False, depth=depth, start_timeout=20, step_timeout=20
    )


def test_steps_pass_through_the_stages_in_order() -> None:
    launcher = FakeLauncher()
    running = executor(launcher)
    told = running.start()
    assert (told.num_blocks, told.depth) == (19, 2)
    futures = [running.submit(StepPlan(n, [], [], [])) for n in range(5)]
    assert [f.result(20).tokens[0].token_ids[0] for f in futures] == [100 * n + 1 for n in range(5)]
    assert [s.num_blocks for s in running.collective("prepare", [])] == [20, 19]
    with pytest.raises(
        ConfigError, match="stage 0: Worker declares no method 'system'; it has load, prepare"
    ):
        running.collective("system", "true")
    running.check_alive()
    threads = [worker.threads for worker in launcher.workers]
    assert [len(t) for t in threads] == [1, 1] and threads[0] != threads[1]
    running.close()
    assert launcher.open_now == []


def test_stages_work_at_the_same_time() -> None:
    running = executor(FakeLauncher("meets"))
    running.start()
    futures = [running.submit(StepPlan(n, [], [], [])) for n in (1, 2)]
    assert [f.result(20).tokens[0].token_ids[0] for f in futures] == [101, 201]
    running.close()


def test_depth_is_what_the_config_says() -> None:
    running = executor(FakeLauncher(), depth=1)
    assert running.start().depth == 1
    running.close()


def test_a_failing_stage_is_named() -> None:
    launcher = FakeLauncher("raises")
    running = executor(launcher)
    running.start()
    with pytest.raises(EngineDeadError, match="stage 1: RuntimeError: boom"):
        running.submit(StepPlan(1, [], [], [])).result(20)
    running.close()
    assert launcher.open_now == []


def test_a_failed_start_closes_every_stage() -> None:
    launcher = FakeLauncher("bad config")
    with pytest.raises(ConfigError, match=r"conf/x\.yaml:3: no"):
        executor(launcher).start()
    assert len(launcher.workers) == 2 and launcher.open_now == []
