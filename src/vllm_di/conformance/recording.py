"""An executor that records the plans that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from vllm_di.components.executor.forwarding import ForwardingExecutor
from vllm_di.components.interfaces import Engine, Executor
from vllm_di.components.messages import ScheduledSequence, StepPlan, StepResult, WorkerReport
from vllm_di.conformance.subject import Subject
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.slots import EngineContainer


class RecordingExecutor(ForwardingExecutor):
    """Passes everything on to another executor, and checks each plan."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.plans: list[StepPlan] = []
        self.report: WorkerReport
        self._tables: dict[int, list[list[int]]] = {}
        """Of each live sequence the blocks of each KvGroup."""

    def start(self) -> WorkerReport:
        self.report = super().start()
        return self.report

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.plans.append(plan)
        self._follow(plan)
        return super().submit(plan)

    def close(self) -> None:
        """The inner one is closed by its own container."""

    def _follow(self, plan: StepPlan) -> None:
        """Raises AssertionError when a step writes to a block that another live request holds, or
        to one that it does not have."""
        for seq_id in plan.finished:
            self._tables.pop(seq_id, None)
        for new in plan.new:
            self._tables[new.seq_id] = [[] for _ in self.report.kv_groups]
        for share in plan.scheduled:
            tables = self._tables[share.seq_id]
            for table, fresh in zip(tables, share.new_blocks, strict=True):
                table += fresh
            self._leave(share)
        for share in plan.scheduled:
            written = self._written(share)
            for other, tables in self._tables.items():
                held = {block for table in tables for block in table}
                shared = written & held if other != share.seq_id else set()
                assert not shared, (
                    f"step {plan.step}: sequence {share.seq_id} writes to blocks {sorted(shared)}, "
                    f"which sequence {other} holds"
                )

    def _leave(self, share: ScheduledSequence) -> None:
        """Blocks that the windows have left are not the sequence's any more."""
        for group, table in zip(self.report.kv_groups, self._tables[share.seq_id], strict=True):
            left = group.first_block(share.num_computed, self.report.block_size)
            table[:left] = [-1] * left

    def _written(self, share: ScheduledSequence) -> set[int]:
        size, tables = self.report.block_size, self._tables[share.seq_id]
        first, last = share.num_computed, share.num_computed + share.num_tokens - 1
        assert all(last // size < len(table) for table in tables), (
            f"sequence {share.seq_id} runs tokens {first} to {last}, but has "
            f"{[len(table) for table in tables]} blocks"
        )
        held = [block for table in tables for block in table if block >= 0]
        assert len(set(held)) == len(held), f"sequence {share.seq_id} has a block twice: {tables}"
        found = {block for table in tables for block in table[first // size : last // size + 1]}
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
