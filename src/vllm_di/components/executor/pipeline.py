"""One worker for each stage of a pipeline: hidden states pass from one to the next."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from typing import Annotated, Any

import msgspec

from vllm_di.components.device.sizes import show_size
from vllm_di.components.executor.inline import call_here
from vllm_di.components.executor.methods import StageMethods
from vllm_di.components.executor.processes import (
    GRACE_SECONDS,
    HostFor,
    ThisHost,
    WorkerHost,
    WorkerProcess,
    called,
    connect,
)
from vllm_di.components.heartbeat import Listener
from vllm_di.components.interfaces import Executor, Placement, Worker, WorkerLauncher
from vllm_di.components.kv_groups import group_layers, sized
from vllm_di.components.messages import (
    CacheSize,
    LimitsReport,
    Peer,
    StepInput,
    StepPlan,
    StepResult,
    WorkerReport,
)
from vllm_di.components.warm_ups import warmed
from vllm_di.errors import ConfigError, EngineDeadError, RequestError

Seconds = Annotated[float, msgspec.Meta(gt=0)]

log = logging.getLogger(__name__)


class PipelineExecutor(Executor):
    """Each stage has a thread, which runs its steps in order: while the second stage works on one
    step, the first works on the next. The workers live in this process, or in one each."""

    def __init__(
        self,
        launcher: WorkerLauncher,
        *,
        processes: bool,
        depth: Annotated[int, msgspec.Meta(ge=1)] | None,
        start_timeout: Seconds,
        step_timeout: Seconds,
    ) -> None:
        self._launcher, self._processes = launcher, processes
        self.depth = depth or launcher.num_stages
        self._start_timeout, self._step_timeout = start_timeout, step_timeout
        self._stages: list[_Stage] = []
        self._listener = Listener()
        self._host: WorkerHost = ThisHost()
        """Starts its processes."""
        self.patience = launcher.num_stages * step_timeout + GRACE_SECONDS

    def run_on(self, host_for: HostFor) -> None:
        """Its workers are processes from now on."""
        names = [stage_name(self._launcher, stage) for stage in range(self._launcher.num_stages)]
        self._host, self._processes = host_for(self._launcher, names), True

    def start(self) -> WorkerReport:
        try:
            self._open()
            reports: list[WorkerReport] = self._call("load", timeout=self._start_timeout)
            report = agreed(reports, self._launcher)
            groups = group_layers([r.kv_specs for r in reports])
            sizes: list[CacheSize] = self._call("prepare", groups, timeout=self._start_timeout)
            report = sized(report, groups, sizes)
            check_fit(reports, sizes, self._launcher)
            warm_ups = self._call("allocate", report.num_blocks, timeout=self._start_timeout)
            report = warmed(report, warm_ups)
        except BaseException:
            self.close()
            raise
        return msgspec.structs.replace(report, depth=self.depth)

    def _open(self) -> None:
        count = self._launcher.num_stages
        places = [Placement(stage=index, num_stages=count) for index in range(count)]
        stages = [_Stage(self._launcher, index) for index in range(count)]
        self._stages = stages
        if not self._processes:
            for stage, place in zip(stages, places, strict=True):
                stage.run(stage.open, self._launcher.open(place))
            return
        workers = []
        names = [stage.name for stage in stages]
        started = self._host.start(self._launcher, places, names, self._listener)
        for stage, worker in zip(stages, started, strict=True):
            stage.open(closing(worker))
            workers.append(worker)
        connect(workers, self._start_timeout)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self._stages[0].thread.submit(self._run, 0, plan, None, future)
        return future

    def _run(
        self, index: int, plan: StepPlan, before: StepResult | None, future: Future[StepResult]
    ) -> None:
        """One stage's part of a step, on its thread; then the next one's turn."""
        stage = self._stages[index]
        try:
            hidden = None if before is None else before.hidden
            result = stage.execute(StepInput(plan, hidden), self._step_timeout)
            if before is not None and (before.num_compiles or before.failed):
                result = _joined(before, result)
            if index + 1 == len(self._stages):
                future.set_result(result)
            else:
                after = self._stages[index + 1].thread
                after.submit(self._run, index + 1, plan, result, future)
        except BaseException as error:
            future.set_exception(stage.dead(error))

    def collective(self, method: str, *args: Any) -> list[Any]:
        return self._call(method, *args, timeout=self._step_timeout)

    def _call(self, method: str, *args: Any, timeout: float) -> list[Any]:
        """A call to every stage, which no stage sees unless it is right for all."""
        for stage in self._stages:
            stage.check(method, args)
        results = []
        for index, stage in enumerate(self._stages):
            with self._launcher.placed(index):
                results.append(stage.run(stage.call, method, args, timeout))
        return results

    def check_alive(self) -> None:
        for stage in self._stages:
            if isinstance(stage.worker, WorkerProcess):
                stage.worker.check_alive()

    def processes(self) -> list[Peer]:
        workers = (getattr(stage, "worker", None) for stage in self._stages)
        return [worker.peer() for worker in workers if isinstance(worker, WorkerProcess)]

    def close(self) -> None:
        with ExitStack() as stack:  # all of them, even when one raises
            stack.callback(self._host.close)
            stack.callback(self._listener.close)
            for stage in self._stages:
                stack.callback(stage.close)
            self._stages = []


def stage_name(launcher: WorkerLauncher, index: int) -> str:
    return called(launcher, f"stage {index}")


class _Stage:
    """A worker, and the thread that makes all calls to it."""

    worker: Worker | WorkerProcess

    def __init__(self, launcher: WorkerLauncher, index: int) -> None:
        self.name = stage_name(launcher, index)
        self._methods = StageMethods(launcher, index)
        self._execute = self._methods.call("execute")
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._stack = ExitStack()

    def open(self, worker: AbstractContextManager[Worker | WorkerProcess]) -> None:
        self.worker = self._stack.enter_context(worker)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.thread.submit(function, *args).result()

    def check(self, method: str, args: Sequence[Any]) -> None:
        """Raises ConfigError or RequestError, with the stage."""
        try:
            self._methods[method].checked(args)
        except RequestError as error:
            raise RequestError(f"{self.name}: {error}", param=error.param) from None
        except ConfigError as error:
            raise type(error)(f"{self.name}: {error}") from None

    def call(self, method: str, args: Sequence[Any], timeout: float) -> Any:
        """On this stage's thread, after ``check``."""
        if isinstance(self.worker, WorkerProcess):
            call = self._methods.call(method)
            return self.worker.call(call, call.frame(*args), timeout)
        return call_here(self.worker, self._methods[method], args)

    def execute(self, step: StepInput, timeout: float) -> StepResult:
        """On this stage's thread."""
        if isinstance(self.worker, Worker):
            return self.worker.execute(step)
        frame = self._execute.frame(StepInput(step.plan.packed(), step.hidden))
        result: StepResult = self.worker.call(self._execute, frame, timeout)
        return result

    def dead(self, error: BaseException) -> EngineDeadError:
        """The error that ends the engine: it names the stage and what happened to it."""
        if isinstance(error, EngineDeadError):
            text = str(error)
            return error if text.startswith(self.name) else EngineDeadError(f"{self.name}: {text}")
        log.error("%s failed", self.name, exc_info=error)
        return EngineDeadError(f"{self.name}: {type(error).__name__}: {error}")

    def close(self) -> None:
        try:
            self.run(self._stack.close)
        finally:
            self.thread.shutdown()


def _joined(before: StepResult, result: StepResult) -> StepResult:
    """The result of a stage, with what an earlier one compiled and the requests that failed
    there."""
    failed = before.failed | result.failed
    return msgspec.structs.replace(
        result,
        tokens=[token for token in result.tokens if token.seq_id not in failed],
        vectors=[vector for vector in result.vectors if vector.seq_id not in failed],
        failed=failed,
        num_compiles=before.num_compiles + result.num_compiles,
    )


def agreed(reports: list[WorkerReport], launcher: WorkerLauncher) -> WorkerReport:
    """The report of the whole pipeline. Raises ConfigError where its stages do not fit together."""
    _same("model.dtype", [r.dtype for r in reports], launcher, "hidden states would be cast")
    _same(
        "kv_layout.block_size",
        [r.block_size for r in reports],
        launcher,
        "all stages share one block table",
    )
    _same("model.vocab_size", [r.vocab_size for r in reports], launcher, "they are one model")
    _same("model.max_model_len", [r.max_model_len for r in reports], launcher, "they are one model")
    return msgspec.structs.replace(
        reports[-1],
        kv_specs=[spec for r in reports for spec in r.kv_specs],
        limits=strictest([r.limits for r in reports]),
        device=", ".join(r.device for r in reports),
        weight_bytes=sum(r.weight_bytes for r in reports),
        details=reports[-1].details | {"stages": [r.details for r in reports]},
    )


def _same(key: str, values: Sequence[Any], launcher: WorkerLauncher, why: str) -> None:
    for stage, value in enumerate(values):
        if value != values[0]:
            raise ConfigError(
                f"{launcher.place(stage, key)} comes out as {value}, but "
                f"{launcher.place(0, key)} as {values[0]}: {why}; set {key} to the same"
            )


def check_fit(
    reports: Sequence[WorkerReport], sizes: Sequence[CacheSize], launcher: WorkerLauncher
) -> None:
    """Raise ConfigError where stages on one device, which all see the same free memory, want more
    than that together."""
    num_blocks = min(size.num_blocks for size in sizes)
    wanted: dict[str, int] = defaultdict(int)
    for stage, (report, size) in enumerate(zip(reports, sizes, strict=True)):
        wanted[report.device] += num_blocks * size.bytes_per_block
        free = report.details.get("memory_free")
        if free is not None and wanted[report.device] > free:
            raise ConfigError(
                f"{launcher.place(stage, 'worker.memory_fraction')}: the stages on "
                f"{report.device} want {show_size(wanted[report.device])} for their KV caches, "
                f"but {show_size(free)} are free; lower it, or set worker.num_blocks"
            )


def strictest(limits: list[LimitsReport]) -> LimitsReport:
    def least(values: Iterable[int | None]) -> int | None:
        return min((v for v in values if v is not None), default=None)

    return LimitsReport(
        mixed_steps=all(x.mixed_steps for x in limits),
        chunked_prefill=all(x.chunked_prefill for x in limits),
        max_prefill_rows=least(x.max_prefill_rows for x in limits),
        max_batch_context=least(x.max_batch_context for x in limits),
        null_block=any(x.null_block for x in limits),
        drafts=all(x.drafts for x in limits),
    )
