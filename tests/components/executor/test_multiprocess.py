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
from vllm_di.components.interfaces import Placement, WorkerLauncher
from vllm_di.components.messages import HiddenStates, SampledToken, StepPlan, StepResult
from vllm_di.errors import ConfigError, EngineDeadError

WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.components.executor.test_multiprocess import FakeWorker
from vllm_di.components.executor import rpc
from vllm_di.components.transport import Codec, Connection, Failure, connect
from vllm_di.containers.worker_process import serve
from vllm_di.errors import ConfigError

rank, address, how = int(sys.argv[1]), sys.argv[2], sys.stdin.read()
if how == "no start" and rank == 1:
    sys.exit(7)
link = Connection(connect(address), Codec(rpc.Command))
if how == "bad config" and rank == 1:
    link.send(Failure.of(ConfigError("conf/x.yaml:3: no")))
    sys.exit(1)
link.send(rpc.Hello(rank))
serve(FakeWorker(rank, how), link)
"""


class FakeWorker:
    """Rank 1 has fewer blocks, and the troubles."""

    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def load(self) -> Any:
        return report(20 - self.rank)

    def allocate(self, num_blocks: int) -> None:
        assert num_blocks == 19

    def execute(self, plan: StepPlan, hidden: HiddenStates | None = None) -> StepResult:
        if self.rank == 1 and self.how == "dies":
            import os

            os.kill(os.getpid(), 9)
        if self.rank == 1 and self.how == "hangs":
            time.sleep(60)
        tokens = [SampledToken(1, plan.step)] if self.rank == 0 else []
        return StepResult(plan.step, tokens)


class Script(WorkerLauncher):
    def __init__(self, folder: Path, how: str) -> None:
        self.path, self.how = folder / "worker.py", how
        root = str(Path(__file__).parents[3])
        self.path.write_text(textwrap.dedent(WORKER.format(root=root)))

    def open(self, placement: Placement) -> Any:
        raise AssertionError("not in this process")

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
    assert [f.result(20).tokens[0].token_id for f in futures] == list(range(5))
    assert [r.num_blocks for r in running.collective("load")] == [20, 19]
    with pytest.raises(ConfigError, match="no method 'system'"):
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


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    running = executor(tmp_path, "dies")
    running.start()
    with pytest.raises(EngineDeadError, match="worker 1 was killed by signal 9"):
        running.submit(StepPlan(1, [], [], [])).result(20)
    with pytest.raises(EngineDeadError, match="worker 1"):
        running.check_alive()
    running.close()
    assert children() == []


def test_a_hanging_worker_is_named(tmp_path: Path) -> None:
    running = executor(tmp_path, "hangs", step_timeout=0.5)
    running.start()
    with pytest.raises(EngineDeadError, match="worker 1 gave no answer"):
        running.submit(StepPlan(1, [], [], [])).result(20)
    running.close()
    assert children() == []
