"""A Ray cluster: joined or started, looked at, and asked for room.

Ray is asked where workers can run, to start their processes, and to end them. Calls do not go
through it.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from vllm_di.components.executor.cluster_settings import ClusterSettings
from vllm_di.components.executor.processes import Process
from vllm_di.components.executor.ray_actor import NodeWorker, ray_ports_beyond
from vllm_di.components.executor.ray_token import authenticate, imported, refuse_open
from vllm_di.components.transport import Failure
from vllm_di.errors import ConfigError, EngineDeadError, nearest, one_line
from vllm_di.progress import tell
from vllm_di.version import __version__

OBJECT_STORE_BYTES = 80 * 2**20
"""Of a cluster that is started here: the least that Ray takes is 75 MB, and nothing of ours lies
there."""
REACH_SECONDS = 5.0
CREATED = "CREATED"
"""The state of a placement group that has room."""
POLL_SECONDS = 0.05
ABSENT_SECONDS, SAY_SECONDS = 2.0, 30.0
"""Between two looks for a resource, and two lines that tell of a wait for room."""
DESCRIBE_SECONDS = 120.0
"""For an actor's process to start and to import this package."""
OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus"}
"""Resources that Ray's options have a name of their own for."""
INTERNAL = ("node:", "memory", "object_store_memory", "accelerator_type:", "bundle")
"""Beginnings of resources that are Ray's own, and nothing to place a worker by."""

log = logging.getLogger(__name__)


class LostError(EngineDeadError):
    """A node had room, and no process of ours runs there."""


class Want(msgspec.Struct, frozen=True):
    """What one worker takes of a node."""

    name: str
    """The worker's, for messages."""
    resource: str
    amount: float
    place: str
    """Where the resource's name was set, for messages."""


class Room(msgspec.Struct, frozen=True):
    """Reserved for one worker."""

    node: str
    """Ray's name of the node."""
    address: str
    num_slots: int
    """Workers of this size that the whole node would hold."""
    slot: int = 0
    """Which of these the worker is."""


class Cluster:
    """Opened by ``open``, closed with all that was reserved and started in it."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._ray: Any = None
        self._folder: str | None = None
        """Of a cluster that was started here: its sockets and logs, for this user alone."""
        self._is_ours = False
        """Whether this process was connected to it by us."""
        self._group: Any = None
        self._actors: list[Any] = []
        self.rooms: list[Room] = []
        """Of the workers, in their order."""
        self._said = ("", 0.0)

    def open(self) -> None:
        """Raises ConfigError where there is none, or where it is not what it has to be."""
        self._ray = imported(is_alone=self._settings.address is None)
        if self._ray.is_initialized():  # by the program that this engine is a part of
            if os.environ.get("RAY_AUTH_MODE") != "token":
                raise ConfigError(
                    "Ray was started by this program without RAY_AUTH_MODE=token: set it before "
                    "ray.init(), or leave the start of Ray to executor=ray",
                    key="cluster.address",
                )
        elif self._settings.address is None:
            self._start_here()
        else:
            self._join(self._settings.address)
        self.address = str(self._ray.util.get_node_ip_address())
        session = str(self._ray.get_runtime_context().get_session_name())
        ports = [str(port) for port in ray_ports_beyond(self.address, session)]
        self.refuse_exposed(self.address, ports)

    def reserve(self, wants: Sequence[Want], strategy: str, seconds: float | None) -> list[Room]:
        """Room for each, all or none. Raises ConfigError for what no node has, EngineDeadError
        where none became free in time. Without ``seconds`` it waits for both, and says so."""
        while True:
            nodes = {n["NodeID"]: n for n in self._ray.nodes() if n["Alive"]}
            absent = list(filter(None, (_absent(want, [*nodes.values()]) for want in wants)))
            if not absent:
                break
            if seconds is not None:
                raise ConfigError(absent[0])
            self._say_wait(absent[0])
            time.sleep(ABSENT_SECONDS)
        bundles = [{want.resource: want.amount} for want in wants]
        self._group = self._ray.util.placement_group(bundles, strategy=strategy)
        while (placed := self._placed(ABSENT_SECONDS if seconds is None else seconds)) is None:
            free = self._ray.available_resources()
            free = {name: n for name, n in free.items() if not name.startswith(INTERNAL)}
            found_none = (
                f"for {len(wants)} workers ({_shown(bundles)}; executor.strategy={strategy}); free "
                f"are {_shown([free])} on {len(nodes)} nodes"
            )
            if seconds is not None:
                raise EngineDeadError(
                    f"the cluster found no room within {seconds:g} s {found_none}"
                )
            self._say_wait(f"the cluster has no room {found_none}")
        nodes = {n["NodeID"]: n for n in self._ray.nodes()}  # one may have come since
        self.rooms = []
        for index, want in enumerate(wants):
            node = nodes[placed[index]]
            total = float(node["Resources"].get(want.resource, want.amount))
            slots = max(1, int(total / want.amount + 1e-6))
            self.rooms.append(Room(placed[index], node["NodeManagerAddress"], slots))
        return self.rooms

    def start(self, wants: Sequence[Want]) -> None:
        """An actor in each room. Raises LostError for one that cannot run this package,
        ConfigError for a node of another version or with open ports."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        remote = self._ray.remote(NodeWorker)
        for index, want in enumerate(wants):
            bundle = strategies.PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index
            )
            options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": bundle}
            self._actors.append(remote.options(**options | _demand(want)).remote())
        asked = [
            actor.describe.remote(room.address, want.resource, room.num_slots)
            for actor, room, want in zip(self._actors, self.rooms, wants, strict=True)
        ]
        for index, (answer, want) in enumerate(zip(asked, wants, strict=True)):
            room = self.rooms[index]
            where = f"{want.name} (node {room.address})"
            try:
                told = self._ray.get(answer, timeout=DESCRIBE_SECONDS)
            except self._ray.exceptions.RayError as error:
                raise LostError(
                    f"{where} does not start: {_last_line(error)}; vllm-di {__version__} and what "
                    "its platform needs must be installed on every node"
                ) from None
            if told["version"] != __version__:
                raise ConfigError(
                    f"{where} has vllm-di {told['version']}, and this engine is {__version__}: "
                    "install the same on every node"
                )
            self.refuse_exposed(room.address, told["beyond"])
            self.rooms[index] = msgspec.structs.replace(room, slot=told["slot"])

    def run(self, index: int, *values: str | bytes) -> Process:
        """Let the actor run its worker, with the values of an ``Errand`` and a ``Line``, until it
        ends."""
        actor = self._actors[index]
        outcome = actor.run.remote(*values)
        return RayProcess(self._ray, actor, outcome, self.rooms[index].address)

    def refuse_exposed(self, address: str, ports: Sequence[str]) -> None:
        """Raises ConfigError for ports of Ray's that are open to more than the cluster."""
        if not ports:
            return
        shown = ", ".join(ports[:3]) + (f" and {len(ports) - 3} more" if len(ports) > 3 else "")
        text = (
            f"Ray listens beyond the loopback and the node's address {address}: {shown}; start it "
            f"with --node-ip-address={address} on a host, or in a container, that has no other"
        )
        if not self._settings.all_interfaces:
            raise ConfigError(
                f"cluster.all_interfaces: {text}, or allow it with cluster.all_interfaces=true",
                key="cluster.all_interfaces",
            )
        log.warning("%s (cluster.all_interfaces=true allows it)", text)

    def end(self, workers: Sequence[int]) -> None:
        """End the processes of some workers; their room stays reserved."""
        for index in workers:
            if index < len(self._actors):
                with suppress(Exception):  # its node may be gone
                    self._ray.kill(self._actors[index], no_restart=True)

    def release(self) -> None:
        """End all processes, and give their room back."""
        self.end(range(len(self._actors)))
        if self._group is not None:
            with suppress(Exception):
                self._ray.util.remove_placement_group(self._group)
        self._actors, self._group = [], None

    def close(self) -> None:
        if self._ray is not None:
            self.release()
            if self._is_ours:
                self._ray.shutdown()
        self._is_ours = False
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # -- inside -------------------------------------------------------------------------------

    def _say_wait(self, what: str) -> None:
        now = time.monotonic()
        if what != self._said[0] or now - self._said[1] > SAY_SECONDS:
            self._said = what, now
            log.warning("%s: waiting for it", what)
            tell(f"waiting: {what}")

    def _placed(self, seconds: float) -> dict[int, str] | None:
        """Bundle to node, once all have one; None where that takes longer."""
        end = time.monotonic() + seconds
        while True:
            table = self._ray.util.placement_group_table(self._group)
            if table["state"] == CREATED:
                placed: dict[int, str] = table["bundles_to_node_id"]
                return placed
            if time.monotonic() > end:
                return None
            time.sleep(POLL_SECONDS)

    def _start_here(self) -> None:
        """A cluster of this host, on the loopback, for as long as this process lives."""
        self._folder = tempfile.mkdtemp(prefix="vllm-di-")
        token = Path(self._folder) / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        authenticate(str(token))
        self._init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=self._folder,
        )

    def _join(self, address: str) -> None:
        host, port = self._settings.host_and_port()
        try:
            socket.create_connection((host, port), REACH_SECONDS).close()
        except OSError as error:
            raise ConfigError(
                f"cluster.address: nobody answers at {address} ({error}); `ray start --head` "
                "starts a cluster, or leave it null for one on this host",
                key="cluster.address",
            ) from None
        refuse_open(address)
        authenticate(self._settings.token_file)
        context = self._init(address=address)
        if getattr(context, "dashboard_url", None):
            log.warning(
                "the cluster at %s has Ray's dashboard on: `ray start --include-dashboard=false` "
                "leaves it off",
                address,
            )

    def _init(self, **options: Any) -> Any:
        try:
            context = self._ray.init(logging_level=logging.WARNING, **options)
        except Exception as error:  # of several kinds, of which none is documented
            raise ConfigError(
                f"cluster.address: {options['address']}: Ray does not start here: "
                f"{one_line(error)}",
                key="cluster.address",
            ) from None
        self._is_ours = True
        return context


class RayProcess(Process):
    """An actor's, as long as its ``run`` lasts."""

    def __init__(self, ray: Any, actor: Any, outcome: Any, node: str) -> None:
        self._ray, self._actor, self._outcome, self.node = ray, actor, outcome, node
        self._is_killed = False

    def ending(self) -> str | None:
        if not self._is_done(0.0):
            return None
        try:
            failure: bytes = self._ray.get(self._outcome)
        except self._ray.exceptions.RayError as error:
            return f"was lost: {one_line(error)}"
        if not failure:
            return "ended"
        told = msgspec.msgpack.decode(failure, type=Failure)
        raise msgspec.structs.replace(told, message=f"node {self.node}: {told.message}").error()

    def wait(self, seconds: float) -> bool:
        return self._is_killed or self._is_done(seconds)

    def signal(self, number: int) -> None:
        """Ray sends none: SIGKILL ends the actor, others are dropped."""
        if number == signal.SIGKILL:
            self.kill()

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._is_killed = True
        with suppress(Exception):  # its node may be gone
            self._ray.kill(self._actor, no_restart=True)

    def _is_done(self, seconds: float) -> bool:
        return bool(self._ray.wait([self._outcome], timeout=seconds)[0])


def _absent(want: Want, nodes: Sequence[dict[str, Any]]) -> str:
    """Nothing, or what to say where no node has it, were all of them free."""
    if any(node["Resources"].get(want.resource, 0) >= want.amount for node in nodes):
        return ""
    names: set[str] = set()
    shown = []
    for node in nodes:
        has = {n: v for n, v in node["Resources"].items() if not n.startswith(INTERNAL)}
        names |= {*has}
        shown.append(f"{node['NodeManagerAddress']}: {_shown([has])}")
    return (
        f"{want.place}: no node of the cluster has {want.amount:g} {want.resource}; they have "
        f"{'; '.join(shown)}{nearest(want.resource, names)}"
    )


def _demand(want: Want) -> dict[str, Any]:
    """As an actor's options name it."""
    option = OPTIONS.get(want.resource)
    return {option: want.amount} if option else {"resources": {want.resource: want.amount}}


def _shown(bundles: Sequence[dict[str, float]]) -> str:
    return ", ".join(
        " ".join(f"{name} {amount:g}" for name, amount in sorted(bundle.items())) or "nothing"
        for bundle in bundles
    )


def _last_line(error: Exception) -> str:
    """Of a traceback that comes as text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
