"""``executor=ray`` with real Ray on two nodes."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.components.test_lines import certificates
from tests.containers.two_platforms import config_dir
from tests.ray.nodes import TINY, Nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
RANKS = ["executor.tensor_parallel_size=2", "executor.strategy=STRICT_SPREAD"]
SPLIT = """\
# @package _global_
# The first layer on our kernels, the rest compiled by OpenVINO.
stages:
  - [platform=cpu, "model.layers=[0,1]", model.dtype=float32]
  - [platform=openvino, "model.layers=[1,null]", model.dtype=float32]

platform:
  name: two
  level: declared
"""


def on(nodes: Nodes, *more: str, threads: bool = True, executor: str = "executor=ray") -> list[str]:
    return [
        executor,
        f"cluster.address={nodes.address}",
        f"cluster.bind={nodes.head}",
        f"cluster.secret_file={nodes.secret}",
        f"cluster.token_file={nodes.token}",
        *(["device.threads=1"] if threads else []),
        *(["cluster.all_interfaces=true"] if nodes.why_one_host else []),  # what Ray does there
        *more,
    ]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def test_one_host_starts_its_own_cluster(nodes: Nodes, want: Any) -> None:
    """In a namespace with another address than the loopback, which nothing listens on."""
    local = ["executor=ray", "device.threads=1"]
    [found] = nodes.ask({"overrides": [*TINY, *local], "listening": True}, node="b")
    assert found.get("tokens") == want, found
    assert all(is_loopback(address) for address, _ in found["ours"]), found
    assert Path(nodes.folder).is_dir()


def test_two_ranks_on_two_nodes(nodes: Nodes, want: Any) -> None:
    """The tokens of one, and no port of ours is open once both are there."""
    [found] = nodes.ask({"overrides": [*TINY, *on(nodes), *RANKS], "listening": True})
    assert found.get("tokens") == want, found
    allowed = {nodes.head, "0.0.0.0", "::"}
    assert all(is_loopback(a) or a in allowed for a in found["ray"]), found


def test_two_platforms_on_two_nodes(nodes: Nodes, want: Any, tmp_path: Path) -> None:
    jobs = {
        "overrides": [
            "platform=two",
            *on(nodes, "executor.strategy=STRICT_SPREAD", threads=False),
        ],
        "config_dirs": [config_dir(tmp_path, SPLIT)],
    }
    [found] = nodes.ask(jobs)
    assert found.get("tokens") == want, found


def test_what_is_refused(nodes: Nodes) -> None:
    """Each a plain error, with the place and the nearest choice."""
    cases: list[tuple[list[str], list[str]]] = [
        (
            [*on(nodes), *RANKS, "communicator=shared_memory"],
            ["the 2 ranks are on 2 nodes, which share no memory", "torch_distributed"],
        ),
        (
            [*on(nodes), "executor.resource=NPU"],
            ["executor.resource", "no node of the cluster has 1 NPU; they have", "CPU 1"],
        ),
        (
            [*on(nodes), *RANKS, "executor.tensor_parallel_size=4", "executor.place_timeout=2"],
            ["found no room within 2 s for 4 workers", "executor.strategy=STRICT_SPREAD"],
        ),
        (
            [*on(nodes), f"cluster.address={nodes.head}:9"],
            [f"nobody answers at {nodes.head}:9"],
        ),
    ]
    if not nodes.why_one_host:
        cases += [
            ([*on(nodes), *RANKS, "cluster.bind=127.0.0.1"], ["cannot reach 127.0.0.1"]),
            ([*on(nodes), "cluster.secret_file=null"], ["set secret_file too"]),
        ]
    found = nodes.ask(*({"overrides": [*TINY, *overrides]} for overrides, _ in cases))
    for answer, (overrides, words) in zip(found, cases, strict=True):
        for word in words:
            assert word in answer.get("text", ""), (overrides, answer)


@pytest.mark.parametrize("harm", ["ray::NodeWorker", "raylet/raylet", "cut"])
def test_a_lost_node_is_noticed_and_named(nodes: Nodes, want: Any, harm: str) -> None:
    """The worker, its raylet with all that it started, or the way to it. On a node of its own, so
    that the others stay."""
    if harm == "cut" and nodes.why_one_host:
        pytest.skip(f"no cable to pull: {nodes.why_one_host}")
    number = {"ray::NodeWorker": 3, "raylet/raylet": 4, "cut": 5}[harm]
    node = f"n{number}"
    resource = f"spare{number}"
    nodes.add(node, number, "--num-cpus=0", f'--resources={{"{resource}": 1}}')
    try:
        cut = ["run", "ip", "link", "set", f"vdi-{node}", "down"]
        job = {
            "overrides": [*TINY, *on(nodes), f"executor.resource={resource}"],
            "harm": cut if harm == "cut" else [harm, nodes.started[node].pid],
        }
        [found] = nodes.ask(job)
        assert found.get("tokens") == want, found
        assert found.get("error") == "EngineDeadError", found
        assert f"worker 0 (node {nodes.address_of(number)})" in found["text"]
        sys.stdout.write(f"{harm}: noticed after {found['s']:.1f} s: {found['text'][:300]}\n")
    finally:
        nodes.stop(node)


def test_a_node_with_another_secret_or_without_a_package(nodes: Nodes, tmp_path: Path) -> None:
    stub = "raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')\n"
    (tmp_path / "openvino.py").write_text(stub)
    other, theirs = nodes.folder / "other", nodes.folder / "theirs"
    for file, text in ((other, b"o"), (theirs, b"x")):
        file.touch(0o600)
        file.write_bytes(text * 32)
    resource = '--resources={"other": 1}'
    files = {nodes.secret: theirs}
    nodes.add("c", 6, "--num-cpus=0", resource, python_path=tmp_path, other_files=files)
    try:
        shared = ["platform=openvino", *on(nodes, threads=False), "executor.resource=other"]
        found = nodes.ask(
            {"overrides": [*shared, f"cluster.secret_file={other}"]}, {"overrides": shared}
        )
        assert "openvino" in found[0].get("text", ""), found[0]
        assert f"worker 0 (node {nodes.address_of(6)})" in found[0]["text"]
        if not nodes.why_one_host:
            assert "holds another secret than the engine's" in found[1].get("text", ""), found[1]
            assert f"node {nodes.address_of(6)}" in found[1]["text"]
    finally:
        nodes.stop("c")


def test_calls_are_encrypted(nodes: Nodes, want: Any, tmp_path: Path) -> None:
    """With certificates of one authority; a node that has one of another's is refused. What a key
    file holds is nowhere in the logs."""
    own = certificates(nodes.folder, "own", "authority")
    foreign = certificates(nodes.folder, "foreign", "stranger")
    tls = f"cluster.tls={{certificate: {own.certificate}, key: {own.key}, "
    tls += f"authority: {own.authority}}}"
    [found] = nodes.ask({"overrides": [*TINY, *on(nodes, tls), *RANKS]})
    assert found.get("tokens") == want, found
    files = {
        Path(own.certificate): Path(foreign.certificate),
        Path(own.key): Path(foreign.key),
        Path(own.authority): Path(foreign.authority),
    }
    said = found["log"]
    if not nodes.why_one_host:
        nodes.add("tls", 7, "--num-cpus=0", '--resources={"tls": 1}', other_files=files)
        try:
            [refused] = nodes.ask({"overrides": [*TINY, *on(nodes, tls), "executor.resource=tls"]})
            assert "cluster.tls" in refused.get("text", ""), refused
            assert "certificate verify failed" in refused["text"].lower(), refused
            said += refused["log"] + refused["text"]
        finally:
            nodes.stop("tls")
    logs = [path for path in nodes.folder.rglob("*") if path.suffix in (".log", ".out", ".err")]
    said += "".join(path.read_text(errors="replace") for path in logs)
    hidden = [*Path(own.key).read_text().splitlines()[1:-1], nodes.secret.read_text()]
    assert len(hidden) > 2
    assert not [text for text in hidden if text in said]
    if nodes.why_one_host:
        pytest.skip(f"no files of a node's own: {nodes.why_one_host}")
