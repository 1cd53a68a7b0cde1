"""An executor that remembers what it was told to run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from vllm_di.components.interfaces import Engine, Executor
from vllm_di.components.messages import Peer, ScheduledSequence, StepPlan, StepResult, WorkerReport
from vllm_di.conformance.subject import Subject
from vllm_di.containers.engine import EngineContainer
from vllm_di.containers.fill import Launcher, opened


class RecordingExecutor(Executor):
    """Passes everything on to another executor, and looks at each plan on its way."""

    def __init__(self, inner: Executor) -> None:
        self._inner, self.depth, self.patience = inner, inner.depth, inner.patience
        self.plans: list[StepPlan] = []
        self.report: WorkerReport
        self._tables: dict[int, list[int]] = {}

    def start(self) -> WorkerReport:
        self.report = self._inner.start()
        return self.report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.plans.append(plan)
        self._follow(plan)
        return self._inner.submit(plan)

    def collective(self, method: str, *args: Any) -> list[Any]:
        return self._inner.collective(method, *args)

    def check_alive(self) -> None:
        self._inner.check_alive()

    def processes(self) -> list[Peer]:
        return self._inner.processes()

    # closed by its own container

    def _follow(self, plan: StepPlan) -> None:
        """Raises AssertionError when a step writes to a block that another live request holds, or
        to one that it does not have."""
        for seq_id in plan.finished:
            self._tables.pop(seq_id, None)
        for new in plan.new:
            self._tables[new.seq_id] = []
        for share in plan.scheduled:
            self._tables[share.seq_id] += share.new_blocks
        for share in plan.scheduled:
            written = self._written(share)
            for other, table in self._tables.items():
                shared = written & set(table) if other != share.seq_id else set()
                assert not shared, (
                    f"step {plan.step}: sequence {share.seq_id} writes to blocks {sorted(shared)}, "
                    f"which sequence {other} holds"
                )

    def _written(self, share: ScheduledSequence) -> set[int]:
        size, table = self.report.block_size, self._tables[share.seq_id]
        first, last = share.num_computed, share.num_computed + share.num_tokens - 1
        assert last // size < len(table), (
            f"sequence {share.seq_id} runs tokens {first} to {last}, but has {len(table)} blocks"
        )
        assert len(set(table)) == len(table), f"sequence {share.seq_id} has a block twice: {table}"
        found = set(table[first // size : last // size + 1])
        assert all(0 <= block < self.report.num_blocks for block in found), f"blocks {found}"
        return found


@contextmanager
def recorded(
    subject: Subject, *more: str, model: str = "gqa"
) -> Iterator[tuple[Engine, RecordingExecutor]]:
    """An engine and the recorder of its plans."""
    assembly = subject.assembly(*more, model=model)
    launcher = Launcher(assembly)
    with opened(EngineContainer, assembly, only=["executor"], launcher=launcher) as outer:
        recorder = RecordingExecutor(outer.executor())
        with opened(EngineContainer, assembly, launcher=launcher, executor=recorder) as container:
            yield container.engine(), recorder
