"""Worker processes that answer, fail, hang and die: small scripts without a model."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.components.scheduler.fakes import report

from vllm_di.components.executor.multiprocess import MultiprocessExecutor
from vllm_di.components.executor.processes import LocalProcess
from vllm_di.components.interfaces import Placement, Worker, WorkerLauncher
from vllm_di.components.messages import (
    CacheSize,
    KvGroup,
    SampledTokens,
    StepInput,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.components.remote import remote
from vllm_di.errors import ConfigError, EngineDeadError, RequestError

WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.components.executor.test_multiprocess import FakeWorker
from vllm_di.components.executor import rpc
from vllm_di.components.heartbeat import Heart
from vllm_di.components.interfaces import Placement
from vllm_di.components.transport import Connection, Failure, connect
from vllm_di.containers.worker_process import serve
from vllm_di.errors import ConfigError

rank, address, how = int(sys.argv[1]), sys.argv[2], sys.stdin.read()
if how == "no start" and rank == 1:
    sys.exit(7)
Heart(address)
link = Connection(connect(address), rpc.GREETING)
if how == "bad config" and rank == 1:
    link.send(Failure.of(ConfigError("conf/x.yaml:3: no")))
    sys.exit(1)
serve(FakeWorker(rank, how), Placement(rank), link)
"""


class FakeWorker(Worker):
    """Rank 1 has fewer blocks, and the troubles."""

    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def load(self) -> WorkerReport:
        return report()

    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        return CacheSize(20 - self.rank, 8)

    def allocate(self, num_blocks: int) -> None:
        assert num_blocks == 19

    @remote
    def temperature(self, unit: str) -> float:
        if unit == "furlong":
            raise RequestError("no such unit")
        return 20.5 + self.rank if unit == "C" else "warm"  # type: ignore[return-value]

    def execute(self, step: StepInput) -> StepResult:
        if self.rank == 1 and self.how == "dies":
            import os

            os.kill(os.getpid(), 9)
        if self.rank == 1 and self.how == "hangs":
            time.sleep(60)
        if self.how == "is stopped":
            if self.rank == 1:
                import os

                os.kill(os.getpid(), 19)
            time.sleep(60)  # as in a collective, which waits for all
        if self.how == "has an answer that came late":
            time.sleep(0.2 if self.rank == 0 else 0)
            if self.rank == 0:
                raise RuntimeError("the connection was closed by the peer")
            import os

            os.kill(os.getpid(), 9)
        tokens = [SampledTokens(1, [step.plan.step])] if self.rank == 0 else []
        return StepResult(step.plan.step, tokens)


class Script(WorkerLauncher):
    def __init__(self, folder: Path, how: str) -> None:
        self.path, self.how = folder / "worker.py", how
        root = str(Path(__file__).parents[3])
        self.path.write_text(textwrap.dedent(WORKER.format(root=root)))

    def open(self, placement: Placement) -> Any:
        raise AssertionError("not in this process")

    def worker_class(self, stage: int) -> type[Worker]:
        return FakeWorker

    def command(self, placement: Placement, address: str) -> tuple[list[str], bytes]:
        return [sys.executable, str(self.path), str(placement.rank), address], self.how.encode()


def executor(folder: Path, how: str, *, step_timeout: float = 20) -> MultiprocessExecutor:
    return MultiprocessExecutor(
        Script(folder, how), tensor_parallel_size=2, start_timeout=60, step_timeout=step_timeout
    )


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "worker.py" in " ".join(c.cmdline())]


def test_steps_run_in_order_and_nobody_is_left(tmp_path: Path) -> None:
    running = executor(tmp_path, "works")
    assert running.start().num_blocks == 19  # the fewest of all ranks
    futures = [running.submit(StepPlan(n, [], [], [])) for n in range(5)]
    assert [f.result(20).tokens[0].token_ids[0] for f in futures] == list(range(5))
    assert [s.num_blocks for s in running.collective("prepare", [])] == [20, 19]
    with pytest.raises(ConfigError, match="no method 'system'; it has load, prepare"):
        running.collective("system", "true")
    running.check_alive()
    assert len(children()) == 2
    running.close()
    assert children() == []


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("no start", EngineDeadError, "worker 1 ended with exit status 7"),
        ("bad config", ConfigError, r"conf/x.yaml:3: no"),
    ],
)
def test_a_failed_start_leaves_no_process(
    how: str, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        executor(tmp_path, how).start()
    assert children() == []


def test_a_process_that_ends_before_it_reads_is_no_broken_pipe() -> None:
    process = LocalProcess(["false"], b"assembly" * 100_000)
    assert process.wait(10)
    assert process.ending() == "ended with exit status 1"


def loses_a_worker(running: MultiprocessExecutor, words: str) -> None:
    """One step, which ends with ``words``."""
    running.start()
    with pytest.raises(EngineDeadError, match=words):
        running.submit(StepPlan(1, [], [], [])).result(60)


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    running = executor(tmp_path, "dies")
    loses_a_worker(running, "worker 1 was killed by signal 9")
    with pytest.raises(EngineDeadError, match="worker 1"):
        running.check_alive()
    running.close()
    assert children() == []


def test_a_stopped_worker_is_named_and_not_those_that_wait_for_it(tmp_path: Path) -> None:
    """The other one beats every half second: on a busy machine it must not count as silent."""
    running = executor(tmp_path, "is stopped", step_timeout=6)
    running.start()
    step = running.submit(StepPlan(1, [], [], []))
    while [peer.silent for peer in running.processes()] != [False, True]:
        assert not step.done()
        time.sleep(0.01)
    with pytest.raises(EngineDeadError, match=r"^worker 1 gave no answer nor a sign of life"):
        step.result(60)
    running.close()
    assert children() == []


def test_a_stopped_worker_that_goes_on_is_no_longer_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_di.components.heartbeat.SILENCE", 1.0)
    running = executor(tmp_path, "works")
    running.start()
    second = psutil.Process(running.processes()[1].pid)
    second.suspend()
    while [peer.silent for peer in running.processes()] != [False, True]:
        time.sleep(0.01)
    second.resume()
    while any(peer.silent for peer in running.processes()):
        time.sleep(0.01)
    assert running.submit(StepPlan(1, [], [], [])).result(20).tokens[0].token_ids[0] == 1
    running.close()


def test_a_dead_worker_is_blamed_before_one_that_failed_because_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_di.components.executor.processes.BLAME_SECONDS", 20.0)
    running = executor(tmp_path, "has an answer that came late")
    loses_a_worker(running, "worker 1 was killed by signal 9")
    running.close()


def test_a_hanging_worker_is_named(tmp_path: Path) -> None:
    running = executor(tmp_path, "hangs", step_timeout=0.5)
    loses_a_worker(running, "worker 1 gave no answer")
    running.close()
    assert children() == []
