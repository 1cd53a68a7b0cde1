"""Where Ray has room for an engine's workers: all of them are placed together, and each group of
them (ranks, or stages) has a ``WorkerHost`` that starts its own."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import msgspec

from vllm_di.components.executor.cluster_settings import ClusterSettings
from vllm_di.components.executor.processes import WorkerHost, WorkerProcess
from vllm_di.components.executor.ray_cluster import Cluster, LostError, Want
from vllm_di.components.heartbeat import Listener
from vllm_di.components.interfaces import Node, Placement, WorkerLauncher
from vllm_di.components.lines import LineListener
from vllm_di.components.meeting import Meeting
from vllm_di.errors import ConfigError, EngineDeadError

MOST_TRIES = 5
"""To place the workers of an engine that replaces another, where a node is lost meanwhile."""
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

log = logging.getLogger(__name__)


class Placing(msgspec.Struct, frozen=True, kw_only=True):
    """How workers are placed: keys of the executor."""

    resource: str | None
    amount: Annotated[float, msgspec.Meta(gt=0)]
    strategy: Strategy
    place_timeout: Annotated[float, msgspec.Meta(gt=0)]
    silence_limit: Annotated[float, msgspec.Meta(ge=1)]


class RaySite:
    """An engine's part of a cluster. ``host`` is asked for each group of workers before the first
    of them starts. ``check_hosts`` is told the address of each worker's host, and may refuse."""

    def __init__(
        self,
        settings: ClusterSettings,
        placing: Placing,
        check_hosts: Callable[[Sequence[str]], None] = lambda addresses: None,
    ) -> None:
        self.settings, self.placing, self._check_hosts = settings, placing, check_hosts
        self.cluster = Cluster(settings)
        self._wants: list[Want] = []
        self._hosts: set[RayHost] = set()
        self._lock = threading.Lock()
        self._is_ready = False

    def host(self, launcher: WorkerLauncher, names: Sequence[str]) -> RayHost:
        first = len(self._wants)
        for index, name in enumerate(names):
            stage = index if launcher.num_stages > 1 else 0
            self._wants.append(self._want(launcher, stage, name))
        found = RayHost(self, range(first, len(self._wants)))
        self._hosts.add(found)
        return found

    def ready(self, launcher: WorkerLauncher) -> None:
        """Have room for all workers, and a process of Ray's in each. Raises ConfigError and
        EngineDeadError."""
        if self._is_ready:
            return
        self.cluster.open()
        tries = MOST_TRIES if launcher.is_replacement else 1
        while True:
            tries -= 1
            self._reserve(launcher)
            try:
                self.cluster.start(self._wants)
                break
            except LostError as error:
                if not tries:
                    raise EngineDeadError(str(error)) from None
                log.warning("%s: the workers are placed once more", error)
                self.cluster.release()
        self._is_ready = True

    def _reserve(self, launcher: WorkerLauncher) -> None:
        placing = self.placing
        seconds = None if launcher.is_replacement else placing.place_timeout
        rooms = self.cluster.reserve(self._wants, placing.strategy, seconds)
        self._check_hosts([room.address for room in rooms])
        own = self.cluster.address
        others = [room.address for room in rooms if room.address != own]
        if others and self.settings.is_local:
            raise ConfigError(
                f"{launcher.place(0, 'cluster.bind')}: a worker on node {others[0]} cannot reach "
                f"{self.settings.bind} of this host; take cluster.bind={own} and "
                "cluster.secret_file, or executor.strategy=STRICT_PACK"
            )

    def leave(self, host: RayHost) -> None:
        """Its workers have ended; with the last of all, this process leaves the cluster."""
        with self._lock:
            if host not in self._hosts:
                return
            self._hosts.remove(host)
            self.cluster.end(host.workers)
            if not self._hosts:
                self.cluster.close()

    def _want(self, launcher: WorkerLauncher, stage: int, name: str) -> Want:
        named, amount = launcher.resource(stage), self.placing.amount
        if self.placing.resource is not None:
            place = launcher.place(stage, "executor.resource")
            return Want(name, self.placing.resource, amount, place)
        if named.name is None:
            raise ConfigError(
                f"{named.place}: the platform does not say what a Ray cluster calls its device; "
                "set it there, or executor.resource=NAME"
            )
        return Want(name, named.name, amount, named.place)


class RayHost(WorkerHost):
    """The nodes of one group."""

    def __init__(self, site: RaySite, workers: range) -> None:
        self._site, self.workers = site, workers
        self._meeting = Meeting()

    def start(
        self,
        launcher: WorkerLauncher,
        placements: Sequence[Placement],
        names: Sequence[str],
        listener: Listener,
    ) -> Iterator[WorkerProcess]:
        site, settings = self._site, self._site.settings
        site.ready(launcher)
        session, meeting = secrets.token_bytes(32), f"cluster://{secrets.token_hex(16)}"
        for worker, placement, name in zip(self.workers, placements, names, strict=True):
            is_group = placement.world_size > 1
            placed = dataclasses.replace(
                placement,
                rendezvous=meeting if is_group else "",
                node=self._node(worker, is_group),
            )
            errand = launcher.errand(placed)
            door = LineListener(
                settings.bind, session, secret_file=settings.secret_file, tls=settings.tls
            )
            process = site.cluster.run(
                worker,
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
                silence_limit=site.placing.silence_limit,
                others=[self._meeting.serve] if is_group else [],
            )

    def close(self) -> None:
        self._meeting.close()
        self._site.leave(self)

    def _node(self, worker: int, is_group: bool) -> Node:
        room = self._site.cluster.rooms[worker]
        group = {self._site.cluster.rooms[other].node for other in self.workers}
        return Node(
            address=room.address,
            num_nodes=len(group) if is_group else 1,
            slot=room.slot,
            num_slots=room.num_slots,
        )
