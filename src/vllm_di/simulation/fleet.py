"""An assembly becomes replicas whose engines, schedulers and cache managers are its own, and whose
executors are simulated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec

from vllm_di.components.device.sizes import parse_size
from vllm_di.components.engine.standard import StandardEngine
from vllm_di.components.executor.roles import Sides, joined_report
from vllm_di.components.interfaces import Drafter, Router
from vllm_di.components.messages import WorkerReport
from vllm_di.components.scheduler.continuous import ContinuousScheduler
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.schema import check
from vllm_di.containers.slots import EngineContainer, ServerContainer
from vllm_di.errors import ConfigError
from vllm_di.simulation.executors import Clock, SimulatedExecutor, Timer
from vllm_di.simulation.matching import File, find_times
from vllm_di.simulation.shapes import Shaper
from vllm_di.simulation.split import SimulatedSplit

ROLES = ("prefill", "decode")


@dataclass(slots=True, eq=False)
class Replica:
    """One engine, and its own time."""

    number: int
    engine: StandardEngine
    executor: SimulatedExecutor | SimulatedSplit
    clock: Clock


@dataclass(slots=True)
class Fleet:
    """All that serves."""

    replicas: list[Replica]
    router: Router
    report: WorkerReport
    """Of each replica."""
    timers: list[Timer]
    """One for each role."""
    files: list[File]
    """Whose step times they use, in the same order."""
    num_ranks: int
    """Of all replicas."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures should know."""

    @property
    def roles(self) -> list[str]:
        return ["decode", "prefill"] if len(self.timers) > 1 else [""]


def open_fleet(
    assembly: Assembly, files: Sequence[File], bandwidth: float | None, stack: ExitStack
) -> Fleet:
    """``bandwidth``: bytes a second between the roles of a split. Raises ConfigError; the
    components are closed with ``stack``."""
    check(EngineContainer, assembly, replaced=["launcher"])
    _refuse(assembly)
    is_split = len(assembly.workers) > 1
    sides = [_Side(assembly, role, files) for role in (["decode", "prefill"] if is_split else [""])]
    report = sides[0].report if not is_split else _joined(assembly, sides)
    node = assembly.engine["executor"]
    counts = [1, node.get("prefill_replicas", 1)] if is_split else [1]
    fleet = Fleet(
        replicas=[],
        router=stack.enter_context(opened(ServerContainer, assembly, only=["router"])).router(),
        report=report,
        timers=[side.timer for side in sides],
        files=[side.file for side in sides],
        num_ranks=assembly.num_replicas
        * sum(n * side.ranks for n, side in zip(counts, sides, strict=True)),
    )
    if is_split and bandwidth is None:
        raise ConfigError(
            f"{assembly.place('executor._target_')}: executor: its roles hand the cache over: say "
            "how fast, such as --bandwidth 10GB (a second)"
        )
    for number in range(assembly.num_replicas):
        clock = Clock()
        executor: SimulatedExecutor | SimulatedSplit
        if is_split:
            each = [side for side, count in zip(sides, counts, strict=True) for _ in range(count)]
            sender = sides[1]
            executor = SimulatedSplit(
                report,
                [side.timer for side in each],
                [side.report.block_size for side in each],
                bytes_per_token=sender.ranks
                * sender.report.bytes_per_block
                / sender.report.block_size,
                bandwidth=bandwidth or 1.0,
                clock=clock,
            )
        else:
            executor = SimulatedExecutor(report, sides[0].timer, clock)
        fleet.replicas.append(_open(assembly, number, executor, clock, stack, fleet))
    return fleet


def _open(
    assembly: Assembly,
    number: int,
    executor: SimulatedExecutor | SimulatedSplit,
    clock: Clock,
    stack: ExitStack,
    fleet: Fleet,
) -> Replica:
    own = assembly.of_replica(number)
    container = stack.enter_context(
        opened(EngineContainer, own, launcher=Launcher(own), executor=executor)
    )
    engine, scheduler = container.engine(), container.scheduler()
    refuse_drafts(container.drafter(), assembly)
    if not isinstance(engine, StandardEngine):
        raise ConfigError(
            f"{assembly.place('engine._target_')}: engine: {type(engine).__qualname__} takes no "
            "clock, so that its time cannot be virtual; take engine=standard, or extend it"
        )
    engine.clock = clock.read
    if isinstance(scheduler, ContinuousScheduler):
        scheduler.clock = clock.read
    elif number == 0:
        fleet.notes.append(
            f"{type(scheduler).__qualname__} reads a clock of its own: what is told of its queue "
            "is real time, not virtual"
        )
    return Replica(number, engine, executor, clock)


def refuse_drafts(drafter: Drafter, assembly: Assembly) -> None:
    """Raise ConfigError where a component guesses tokens."""
    if drafter.max_drafts:
        raise ConfigError(
            f"{assembly.place('drafter._target_')}: drafter: {type(drafter).__qualname__}: which "
            "drafts prove right depends on the text, and a simulation has none; take drafter=none"
        )


def _refuse(assembly: Assembly) -> None:
    """Raise ConfigError for what cannot be simulated."""
    roles = set(assembly.workers)
    if len(roles) > 1 and roles != set(ROLES):
        raise ConfigError(
            f"{assembly.choices['platform'].origin}: platform={assembly.platform.name} has the "
            f"roles {', '.join(assembly.workers)}; what can be simulated are {' and '.join(ROLES)}"
        )
    for role, stages in assembly.workers.items():
        if len(stages) > 1:
            raise ConfigError(
                f"{assembly.choices['platform'].origin}: platform={assembly.platform.name} has "
                f"{len(stages)} stages ({role}): a pipeline cannot be simulated; take a platform "
                "of one stage, or of the roles prefill and decode"
            )


class _Side:
    """The workers of one role."""

    def __init__(self, assembly: Assembly, role: str, files: Sequence[File]) -> None:
        own = assembly.of_role(role) if role else assembly
        node = assembly.engine["executor"]
        key = f"{role}_tensor_parallel_size" if role else "tensor_parallel_size"
        self.ranks = int(node.get(key, 1))
        self.file = find_times(own, self.ranks, files)
        times = self.file.times
        if times.report.pooling is not None:
            raise ConfigError(
                f"{self.file.path}: a model that pools generates no token to wait for"
            )
        self.report = _sized(times.report, own)
        self.timer = Timer(times.model_of_time(), Shaper(self.report.kv_groups), role)


def _sized(report: WorkerReport, assembly: Assembly) -> WorkerReport:
    """With as many blocks as the worker would have; as many as were there when its steps were
    measured, where the config does not say."""
    node, prefix = assembly.stages[0]["worker"], assembly.prefix(0)
    chunk, seqs = int(node["max_num_batched_tokens"]), int(node["max_num_seqs"])
    least = int(report.limits.null_block) + sum(
        group.most_blocks(report.max_model_len, chunk, report.block_size)
        for group in report.kv_groups
    )
    num_blocks, memory = node.get("num_blocks"), node.get("kv_cache_memory")
    if num_blocks is not None and memory is not None:
        raise ConfigError(
            f"{assembly.place(f'{prefix}worker.num_blocks')}: {prefix}worker: num_blocks "
            f"({num_blocks}) and kv_cache_memory ({memory}) both size the KV cache; give one"
        )
    key = f"{prefix}worker.num_blocks"
    if num_blocks is not None:
        try:
            blocks = msgspec.convert(num_blocks, int)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{assembly.place(key)}: {key}: {error}") from None
    elif memory is not None:
        key = f"{prefix}worker.kv_cache_memory"
        blocks = parse_size(memory, key) // report.bytes_per_block
    else:
        blocks = min(report.num_blocks, seqs * least)
    if blocks < least:
        raise ConfigError(
            f"{assembly.place(key)}: {key}: the KV cache has room for {blocks} blocks, but one "
            f"sequence of {report.max_model_len} tokens needs {least}"
        )
    return msgspec.structs.replace(report, num_blocks=blocks)


def _joined(assembly: Assembly, sides: Sequence[_Side]) -> WorkerReport:
    """As ``DisaggregatedExecutor.start`` reports."""
    decode, prefill = sides
    node = assembly.engine["executor"]
    count = int(node["prefill_replicas"])
    both = Sides(
        Launcher(msgspec.structs.replace(assembly, replica=0)),
        {"prefill": prefill.ranks, "decode": decode.ranks},
        decode.report,
        prefill.report,
    )
    both.check()
    report = joined_report(both, [decode.report, *[prefill.report] * count])
    from vllm_di.components.executor.disaggregated import STEPS_AHEAD

    ahead = STEPS_AHEAD * count
    return msgspec.structs.replace(report, depth=1 + ahead, prefill_depth=ahead)
