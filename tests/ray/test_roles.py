"""Workers of prompts on one node, those of tokens on another, as each role's platform says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.components.test_lines import certificates
from tests.containers.two_platforms import config_dir
from tests.ray.nodes import Nodes
from tests.ray.test_ray import on

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SPLIT = """\
# @package _global_
defaults:
  - override /executor: ray_disaggregated

workers:
  prefill:
    - [platform=cpu, worker=handover, model.dtype=float32, platform.ray.resource=prompts]
  decode:
    - [platform={decode}, worker=handover, model.dtype=float32, platform.ray.resource=tokens]

platform:
  name: apart
  level: declared
  detect: {{}}
"""


def jobs(nodes: Nodes, folder: Path, decode: str, *more: str) -> dict[str, Any]:
    overrides = on(nodes, *more, threads=False, executor="executor=ray_disaggregated")
    directory = config_dir(folder, SPLIT.format(decode=decode), "apart")
    return {"overrides": ["platform=apart", *overrides], "config_dirs": [directory]}


@pytest.mark.parametrize("decode", ["openvino", "cpu"])
def test_prompts_and_tokens_on_two_nodes(
    nodes: Nodes, want: Any, tmp_path: Path, decode: str
) -> None:
    """The tokens of one worker, also once that of the prompts is gone. The cache is offered at the
    node's own address, and to nobody without a certificate."""
    own = certificates(nodes.folder, "own", "authority")
    tls = f"cluster.tls={{certificate: {own.certificate}, key: {own.key}, "
    tls += f"authority: {own.authority}}}"
    there = nodes.started["b"].pid
    job = jobs(nodes, tmp_path, decode, *([tls] if decode == "cpu" else []))
    [found] = nodes.ask(job | {"listening_on": there, "lose": there})
    assert found.get("tokens") == want, found
    assert nodes.address_of(2) in found["theirs"], found
    assert found["after"] == want, found
    assert "prefill 0 has ended" in found["log"], found["log"][-3000:]


def test_memory_is_not_shared_between_nodes(nodes: Nodes, tmp_path: Path) -> None:
    if nodes.why_one_host:
        pytest.skip(f"nodes share memory: {nodes.why_one_host}")
    [found] = nodes.ask(jobs(nodes, tmp_path, "cpu", "kv_transfer=shared_memory"))
    assert "which share no memory; take kv_transfer=tcp" in found.get("text", ""), found
