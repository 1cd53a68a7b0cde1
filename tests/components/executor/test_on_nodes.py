"""Workers that connect over TCP, as those on other hosts do, and ``executor=ray`` over a cluster
that is made up: everything but Ray itself, which ``make test-ray`` has."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from tests.components.executor.test_multiprocess import Script, children, loses_a_worker
from tests.containers.two_platforms import config_dir

from vllm_di import LLM, SamplingParams
from vllm_di.components.executor.cluster_settings import ClusterSettings
from vllm_di.components.executor.multiprocess import MultiprocessExecutor
from vllm_di.components.executor.processes import LocalProcess, Process, WorkerHost, WorkerProcess
from vllm_di.components.executor.ray_actor import claimed
from vllm_di.components.executor.ray_cluster import LostError, Room, Want
from vllm_di.components.heartbeat import Listener
from vllm_di.components.interfaces import Node, Placement, WorkerLauncher
from vllm_di.components.lines import LineListener
from vllm_di.components.messages import StepPlan
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import Launcher, open_engine, opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError, EngineDeadError

WORKER = """
import sys
sys.path.insert(0, {root!r})
import msgspec
from tests.components.executor.test_multiprocess import FakeWorker
from vllm_di.components.executor import rpc
from vllm_di.components.heartbeat import Heart
from vllm_di.components.interfaces import Placement
from vllm_di.components.lines import Line
from vllm_di.components.transport import Connection
from vllm_di.containers.worker_process import serve

rank, how = int(sys.argv[1]), sys.stdin.read()
line = msgspec.json.decode(sys.argv[2], type=Line)
Heart(line.connect())
serve(FakeWorker(rank, how), Placement(rank), Connection(line.connect(), rpc.GREETING))
"""
ERRAND = """
import pkgutil, sys
import msgspec
function, *values = msgspec.msgpack.decode(sys.stdin.buffer.read())
pkgutil.resolve_name(function)(*values)
"""
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["a", "hello world", "x" * 70]
TINY = ["platform=cpu", "model.dtype=float32", "ops=torch", "graph=eager"]
RAY = ["executor=ray", "device.threads=1"]


class TcpHost(WorkerHost):
    """Processes of this host, over TCP."""

    def __init__(self, silence_limit: float) -> None:
        self.silence_limit = silence_limit

    def start(
        self,
        launcher: WorkerLauncher,
        placements: Sequence[Placement],
        names: Sequence[str],
        listener: Listener,
    ) -> Iterator[WorkerProcess]:
        for placement, name in zip(placements, names, strict=True):
            door = LineListener("127.0.0.1", bytes(32))
            line = msgspec.json.encode(door.line).decode()
            process = LocalProcess(*launcher.command(placement, line))
            yield WorkerProcess(
                name, process, door, listener=listener, silence_limit=self.silence_limit
            )


def executor(folder: Path, how: str, *, silence_limit: float = 20.0) -> MultiprocessExecutor:
    launcher = Script(folder, how)
    launcher.path.write_text(textwrap.dedent(WORKER.format(root=str(Path(__file__).parents[3]))))
    found = MultiprocessExecutor(
        launcher, tensor_parallel_size=2, start_timeout=60, step_timeout=60
    )
    found.run_on(lambda launcher, names: TcpHost(silence_limit))
    return found


def test_steps_go_over_tcp_and_nobody_is_left(tmp_path: Path) -> None:
    running = executor(tmp_path, "works")
    assert running.start().num_blocks == 19
    futures = [running.submit(StepPlan(n, [], [], [])) for n in range(5)]
    assert [f.result(20).tokens[0].token_ids[0] for f in futures] == list(range(5))
    running.close()
    assert children() == []


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    running = executor(tmp_path, "dies")
    loses_a_worker(running, "worker 1 was killed by signal 9")
    running.close()


def check_for_ever(running: MultiprocessExecutor) -> None:
    while True:
        running.check_alive()
        time.sleep(0.05)


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_worker_without_a_heartbeat_counts_as_gone(is_busy: bool, tmp_path: Path) -> None:
    """As behind a network that is cut: nothing closes, nothing arrives."""
    running = executor(tmp_path, "is stopped" if is_busy else "works", silence_limit=3.0)
    words = r"worker 1 gave no sign of life for 3 s: the worker, its node or the network is gone"
    if is_busy:
        loses_a_worker(running, words)
    else:
        running.start()
        os.kill(running.processes()[1].pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=words):
            check_for_ever(running)
    running.close()
    assert children() == []


# ------------------------------------------------------------------------------------------------
# executor=ray


class MadeUpCluster:
    """A node for each worker, all of them this host."""

    nodes = ("one", "two")
    own = "127.0.0.1"
    addresses = ("127.0.0.1", "127.0.0.1")
    wants: Sequence[Want] = ()
    waited: ClassVar[list[float | None]] = []
    """Seconds that each search for room was given."""
    lost: ClassVar[list[str]] = []
    """What the next starts of processes run into."""
    num_closed = 0

    def __init__(self, settings: ClusterSettings) -> None:
        self.address = self.own
        self.rooms: list[Room] = []

    def open(self) -> None: ...

    def reserve(self, wants: Sequence[Want], strategy: str, seconds: float | None) -> list[Room]:
        type(self).wants = list(wants)
        type(self).waited.append(seconds)
        self.rooms = [Room(self.nodes[i], self.addresses[i], 1) for i in range(len(wants))]
        return self.rooms

    def start(self, wants: Sequence[Want]) -> None:
        if self.lost:
            raise LostError(self.lost.pop())

    def run(self, index: int, *values: str | bytes) -> Process:
        process = LocalProcess([sys.executable, "-c", ERRAND], msgspec.msgpack.encode(values))
        process.node = self.nodes[index]
        return process

    def end(self, workers: Sequence[int]) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None:
        type(self).num_closed += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> type[MadeUpCluster]:
    fresh = type("Cluster", (MadeUpCluster,), {"waited": [], "lost": []})
    monkeypatch.setattr("vllm_di.components.executor.ray_host.Cluster", fresh)
    return fresh


def tokens(*overrides: str) -> list[Any]:
    with LLM("tiny", overrides=overrides) as llm:
        return [a.outputs[0].token_ids for a in llm.generate(PROMPTS, GREEDY)]


def test_ranks_on_two_nodes_give_the_tokens_of_one(cluster: type[MadeUpCluster]) -> None:
    found = tokens(*TINY, *RAY, "executor.tensor_parallel_size=2")
    assert found == tokens(*TINY)
    assert [want.resource for want in cluster.wants] == ["CPU", "CPU"]
    assert "conf/platform/cpu.yaml:" in cluster.wants[0].place


SPLIT = ["platform=split_cpu_cpu", "model.dtype=float32", "ops=torch"]


@pytest.mark.parametrize("way", ["tcp", "shared_memory"])
def test_roles_on_the_nodes_of_a_cluster(way: str, cluster: type[MadeUpCluster]) -> None:
    """Placed together, with the tokens of one worker; the cluster is left once."""
    cluster.nodes = ("one", "one")
    roles = ["executor=ray_disaggregated", f"kv_transfer={way}", "device.threads=1"]
    assert tokens(*SPLIT, *roles) == tokens(*TINY)
    assert [want.name for want in cluster.wants] == ["decode stage 0", "prefill stage 0"]
    assert [want.resource for want in cluster.wants] == ["CPU", "CPU"]
    assert "conf/platform/cpu.yaml:" in cluster.wants[1].place
    assert cluster.num_closed == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["kv_transfer=shared_memory"], "kv_transfer=shared_memory: the workers are on 192.0.2.7"),
        (["kv_transfer=tcp"], "kv_transfer.secret_file: a worker at 192.0.2.7 can be reached"),
        (["kv_transfer.bind=127.0.0.1"], "kv_transfer.bind=127.0.0.1: the workers are on several"),
        (["kv_transfer=nixl"], "nixl"),
        (["kv_transfer=none"], "kv_transfer=none moves no cache"),
        (["executor=ray"], "runs no workers of the role 'prefill'"),
    ],
)
def test_roles_that_cannot_reach_each_other(
    more: list[str], words: str, cluster: type[MadeUpCluster]
) -> None:
    cluster.own, cluster.addresses = "192.0.2.7", ("192.0.2.7", "192.0.2.8")
    with pytest.raises(ConfigError, match=words):
        tokens(*SPLIT, "executor=ray_disaggregated", "device.threads=1", *more)


def placed(more: Sequence[str] = (), *, is_replacement: bool) -> None:
    """An engine is started, and ended."""
    assembly = assemble(["model=tiny", *TINY, *RAY, *more])
    with open_engine(assembly, launcher=Launcher(assembly, is_replacement=is_replacement)):
        pass


def test_an_engine_that_replaces_another_waits_for_room(cluster: type[MadeUpCluster]) -> None:
    placed(is_replacement=False)
    cluster.lost += ["worker 0 (node one) does not start"] * 2
    placed(is_replacement=True)
    assert cluster.waited == [60, None, None, None]
    cluster.lost += ["worker 0 (node one) does not start"]
    with pytest.raises(EngineDeadError, match=r"worker 0 \(node one\) does not start"):
        placed(is_replacement=False)
    assert cluster.num_closed == 3


def test_replicas_want_a_cluster_that_is_there() -> None:
    with pytest.raises(ConfigError, match="each engine would start a cluster of its own"):
        assemble(["model=tiny", *TINY, *RAY, "executor.data_parallel_size=2"])


def test_parts_of_a_node_are_shared_out_between_engines() -> None:
    one, first = claimed("test of parts", 2)
    other, second = claimed("test of parts", 2)
    assert (first, second) == (0, 1)
    one.close()
    again, third = claimed("test of parts", 2)
    assert third == 0
    again.close()
    other.close()


def test_shared_memory_between_nodes_is_refused() -> None:
    assembly = assemble(["model=tiny", *TINY, "communicator=shared_memory"])
    placement = Placement(0, 2, "cluster://x", node=Node("10.0.0.1", num_nodes=2))
    with (
        pytest.raises(ConfigError) as caught,
        opened(WorkerContainer, assembly, only=["communicator"], placement=placement),
    ):
        pass
    text = str(caught.value)
    assert "command line: communicator=shared_memory" in text
    assert "the 2 ranks are on 2 nodes, which share no memory" in text
    assert "take communicator=torch_distributed, or executor.strategy=STRICT_PACK" in text


def test_stages_name_their_own_resource(tmp_path: Path) -> None:
    overrides = ["model=tiny", "platform=two", "executor=ray"]
    launcher = Launcher(assemble(overrides, [config_dir(tmp_path)]))
    found = [launcher.resource(stage) for stage in range(launcher.num_stages)]
    assert [resource.name for resource in found] == ["CPU", "CPU"]
    assert "stages.1.platform.ray.resource" in found[1].place
    assert "conf/platform/cpu.yaml:" in found[1].place


def test_a_worker_that_cannot_reach_the_engine(cluster: type[MadeUpCluster]) -> None:
    cluster.addresses = ("127.0.0.1", "192.0.2.7")
    with pytest.raises(ConfigError, match=r"cluster.bind: a worker on node 192.0.2.7 cannot reach"):
        tokens(*TINY, *RAY, "executor.tensor_parallel_size=2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.bind=10.0.0.1"], "command line: cluster.bind=10.0.0.1: .*set secret_file too"),
        (["cluster.secret_file=/nowhere"], "=/nowhere: cluster.secret_file: /nowhere: No such"),
        (["cluster.address=somewhere"], "'somewhere' is no HOST:PORT"),
        (["cluster.token_file=/nowhere"], "=/nowhere: cluster.token_file: there is no file"),
        (["cluster.bnd=10.0.0.1"], "cluster has no key 'bnd'.*did you mean 'bind'"),
        (["executor.strategy=PCK"], "executor.strategy: .*did you mean 'PACK'"),
        (
            ["cluster.tls={certificate: /no, key: /no, authority: /no}"],
            "cluster.tls.certificate: there is no file /no",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_cannot_be(
    overrides: list[str], words: str, cluster: type[MadeUpCluster]
) -> None:
    with pytest.raises(ConfigError, match=words):
        tokens(*TINY, *RAY, *overrides)


def test_a_cluster_that_no_executor_takes() -> None:
    with pytest.raises(ConfigError) as caught:
        assemble(["model=tiny", "platform=cpu", "cluster.bind=10.0.0.1"])
    assert str(caught.value) == (
        "command line: cluster.bind=10.0.0.1: cluster.bind: executor=inline places no workers on a "
        "cluster; take executor=ray, or leave it out"
    )


def test_without_ray_the_start_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"executor=ray needs the package ray: pip install"):
        tokens(*TINY, *RAY)
