"""Workers on the nodes of a Ray cluster.

Ray places their processes and starts them. Each worker then connects to this process, builds its
own container from the assembly and takes the same calls as a worker process of this host does, over
TCP (``components/lines.py``).
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Literal

import msgspec

from vllm_di.components.executor.cluster_settings import ClusterSettings
from vllm_di.components.executor.multiprocess import MultiprocessExecutor
from vllm_di.components.executor.pipeline import PipelineExecutor
from vllm_di.components.executor.processes import WorkerHost, WorkerProcess
from vllm_di.components.executor.ray_cluster import Cluster, Room, Want
from vllm_di.components.heartbeat import Listener
from vllm_di.components.interfaces import Executor, Node, Placement, WorkerLauncher
from vllm_di.components.lines import LineListener
from vllm_di.components.meeting import Meeting
from vllm_di.components.messages import Peer, StepPlan, StepResult, WorkerReport
from vllm_di.errors import ConfigError

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class RayExecutor(Executor):
    """The ranks of a model in one piece, or the stages of a pipeline, each where Ray has room for
    it. A worker without a heartbeat for ``silence_limit`` seconds ends the engine, with its node's
    name in the error; whoever restarts the engine has its workers placed anew."""

    def __init__(
        self,
        launcher: WorkerLauncher,
        *,
        cluster: ClusterSettings,
        tensor_parallel_size: Annotated[int, msgspec.Meta(ge=1, le=64)],
        depth: Annotated[int, msgspec.Meta(ge=1)] | None,
        resource: str | None,
        amount: Annotated[float, msgspec.Meta(gt=0)],
        strategy: Strategy,
        place_timeout: Seconds,
        start_timeout: Seconds,
        step_timeout: Seconds,
        silence_limit: Annotated[float, msgspec.Meta(ge=1)],
    ) -> None:
        cluster.check()
        if launcher.num_stages > 1 and tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size: {tensor_parallel_size} ranks of a platform with "
                f"{launcher.num_stages} stages: a stage has one; take 1"
            )
        host = RayHost(
            cluster,
            resource=resource,
            amount=amount,
            strategy=strategy,
            place_timeout=place_timeout,
            silence_limit=silence_limit,
        )
        inner: MultiprocessExecutor | PipelineExecutor
        if launcher.num_stages > 1:
            inner = PipelineExecutor(
                launcher,
                processes=True,
                depth=depth,
                start_timeout=start_timeout,
                step_timeout=step_timeout,
            )
        else:
            inner = MultiprocessExecutor(
                launcher,
                tensor_parallel_size=tensor_parallel_size,
                start_timeout=start_timeout,
                step_timeout=step_timeout,
            )
        inner.host = host
        self._inner = inner
        self.depth, self.patience = inner.depth, inner.patience

    def start(self) -> WorkerReport:
        return self._inner.start()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        return self._inner.submit(plan)

    def collective(self, method: str, *args: Any) -> list[Any]:
        return self._inner.collective(method, *args)

    def check_alive(self) -> None:
        self._inner.check_alive()

    def processes(self) -> list[Peer]:
        return self._inner.processes()

    def close(self) -> None:
        self._inner.close()


class RayHost(WorkerHost):
    """The nodes of a cluster."""

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        resource: str | None,
        amount: float,
        strategy: str,
        place_timeout: float,
        silence_limit: float,
    ) -> None:
        self._settings = settings
        self._resource, self._amount, self._strategy = resource, amount, strategy
        self._place_timeout, self._silence_limit = place_timeout, silence_limit
        self._cluster = Cluster(settings)
        self._meeting = Meeting()

    def start(
        self,
        launcher: WorkerLauncher,
        placements: Sequence[Placement],
        names: Sequence[str],
        listener: Listener,
    ) -> Iterator[WorkerProcess]:
        cluster, settings = self._cluster, self._settings
        wants = [self._want(launcher, placement.stage) for placement in placements]
        cluster.open()
        rooms = cluster.reserve(wants, self._strategy, self._place_timeout)
        self._check_ways(rooms, cluster.address, launcher)
        cluster.start(wants, names)
        session, meeting = secrets.token_bytes(32), f"cluster://{secrets.token_hex(16)}"
        for index, (placement, name) in enumerate(zip(placements, names, strict=True)):
            is_group = placement.world_size > 1
            placed = dataclasses.replace(
                placement,
                rendezvous=meeting if is_group else "",
                node=_node(rooms, index, is_group, sees_own=cluster.told[index]["sees_own"]),
            )
            errand = launcher.errand(placed)
            door = LineListener(
                settings.bind, session, secret_file=settings.secret_file, tls=settings.tls
            )
            process = cluster.run(
                index,
                errand.function,
                errand.placement,
                errand.assembly,
                msgspec.json.encode(door.line),
            )
            yield WorkerProcess(
                name,
                process,
                door,
                listener=listener,
                silence_limit=self._silence_limit,
                others=[self._meeting.serve] if is_group else [],
            )

    def close(self) -> None:
        self._meeting.close()
        self._cluster.close()

    def _want(self, launcher: WorkerLauncher, stage: int) -> Want:
        named = launcher.resource(stage)
        if self._resource is not None:
            return Want(self._resource, self._amount, launcher.place(stage, "executor.resource"))
        if named.name is None:
            raise ConfigError(
                f"{named.place}: the platform does not say what a Ray cluster calls its device; "
                "set it there, or executor.resource=NAME"
            )
        return Want(named.name, self._amount, named.place)

    def _check_ways(self, rooms: Sequence[Room], own: str, launcher: WorkerLauncher) -> None:
        """Raise ConfigError where a worker could not reach this process."""
        others = [room.address for room in rooms if room.address != own]
        if others and self._settings.is_local:
            raise ConfigError(
                f"{launcher.place(0, 'cluster.bind')}: a worker on node {others[0]} cannot reach "
                f"{self._settings.bind} of this host; take cluster.bind={own} and "
                "cluster.secret_file, or executor.strategy=STRICT_PACK"
            )


def _node(rooms: Sequence[Room], index: int, is_group: bool, *, sees_own: bool) -> Node:
    room = rooms[index]
    before = sum(other.node == room.node for other in rooms[:index])
    return Node(
        address=room.address,
        num_nodes=len({other.node for other in rooms}) if is_group else 1,
        slot=0 if sees_own else before,  # Ray hides the devices of others from a process
        num_slots=max(room.num_slots, sum(other.node == room.node for other in rooms)),
    )
