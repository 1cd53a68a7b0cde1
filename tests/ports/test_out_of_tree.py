"""A port in a package of its own: built as a wheel, installed by pip, used with no change here."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROVIDER = '''
"""Attention and communicator of MyChip."""

from pathlib import Path

import torch

from vllm_di.components.interfaces import AttentionBackend, Communicator, KvLayout, Placement


class MyChipAttention(AttentionBackend):
    """One sequence at a time, in fp32."""

    def __init__(self, kv_layout: KvLayout, *, log: str | None, loud: bool) -> None:
        self.kv_layout, self.log = kv_layout, log

    def build(self, batch, out=None):
        return batch

    def forward(self, q, k, v, cache, metadata, spec):
        if self.log:
            with Path(self.log).open("a") as file:
                file.write("attention\\n")
        self.kv_layout.write(cache, k, v, metadata.slot_mapping)
        out = torch.empty_like(q)
        start = 0
        for row, (queries, length) in enumerate(
            zip(metadata.query_lens_host, metadata.seq_lens_host, strict=True)
        ):
            keys, values = self.kv_layout.gather(cache, metadata.block_table[row], length)
            group = spec.num_heads // spec.num_kv_heads
            keys = keys.float().repeat_interleave(group, 1)
            values = values.float().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q[start : start + queries].float(), keys)
            seen = torch.arange(length) <= torch.arange(length - queries, length)[:, None]
            scores = (scores * spec.scale).masked_fill(~seen, float("-inf")).softmax(-1)
            out[start : start + queries] = torch.einsum("hqk,khd->qhd", scores, values).to(q)
            start += queries
        return out


class MyChipCommunicator(Communicator):
    """A world of one."""

    def __init__(self, placement: Placement, *, log: str | None) -> None:
        self.rank, self.world_size, self.log = placement.rank, placement.world_size, log
        if log:
            with Path(log).open("a") as file:
                file.write("communicator\\n")

    def all_reduce(self, x):
        return x

    def all_gather(self, x, dim=-1):
        return x

    def reduce_scatter(self, x, dim=0):
        return x

    def broadcast(self, x, src=0):
        return x

    def send(self, x, dst):
        raise RuntimeError("alone")

    def recv(self, x, src):
        raise RuntimeError("alone")

    def barrier(self):
        pass
'''

FILES = {
    "mychip/__init__.py": "",
    "mychip/provider.py": PROVIDER,
    "mychip/conf/platform/mychip.yaml": """\
# @package _global_
# The MyChip accelerator.
defaults:
  - override /attention: mychip
  - override /communicator: mychip

platform:
  name: mychip
  level: declared
  interface: "1.0"  # the minor before is served too
  detect: {}
""",
    "mychip/conf/attention/mychip.yaml": """\
# Attention of MyChip.
_target_: mychip.provider.MyChipAttention
log: null   # a file that each call adds a line to
loud: true  # for no reason
""",
    "mychip/conf/communicator/mychip.yaml": """\
# A world of one.
_target_: mychip.provider.MyChipCommunicator
log: null  # a file that the start adds a line to
""",
}


def build_wheel(
    folder: Path, files: dict[str, str], name: str = "mychip_port", port: str = "mychip"
) -> Path:
    """A wheel is a zip with three metadata files: no build tool needed."""
    info = f"{name}-1.0.dist-info"
    package = next(iter(files)).split("/")[0]
    contents = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{info}/entry_points.txt": f"[vllm_di.ports]\n{port} = {package}\n",
    }
    record = []
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{path},sha256={digest.decode()},{len(text.encode())}")
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return wheel


def install(site: Path, *wheels: Path) -> None:
    arguments = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run([*command, *map(str, wheels)], check=True)


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_di.cli", *arguments]
    env = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    install(site, build_wheel(tmp_path, FILES))
    return site


def test_it_serves_through_the_port(site: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    asked = ["complete", "hello", "model=tiny", "model.dtype=float32", "--max-tokens", "4"]
    plain = run(site, *asked, "platform=cpu")
    assert plain.returncode == 0, plain.stderr
    logs = f"attention.log={log}", f"communicator.log={log}"
    ported = run(site, *asked, "platform=mychip", *logs)
    assert ported.returncode == 0, ported.stderr
    assert ported.stdout == plain.stdout
    calls = log.read_text().split()
    assert calls.count("communicator") == 1
    assert calls.count("attention") >= 4


def test_explain_shows_the_package(site: Path) -> None:
    done = run(site, "explain", "--json", "platform=mychip", "model=tiny")
    assert done.returncode == 0, done.stderr
    row = next(r for r in json.loads(done.stdout)["rows"] if r["slot"] == "attention")
    assert row["target"] == "mychip.provider.MyChipAttention"
    assert (row["chosen_by"], row["version"]) == ("platform", "1.0")
    assert row["place"].endswith("platform/mychip.yaml:4")


def test_the_users_choice_beats_the_port(site: Path) -> None:
    done = run(site, "explain", "--json", "platform=mychip", "model=tiny", "attention=sdpa")
    row = next(r for r in json.loads(done.stdout)["rows"] if r["slot"] == "attention")
    assert row["target"].endswith("SdpaAttention")
    assert row["chosen_by"] == "command line"


def test_no_code_of_a_port_runs_before_it_is_named(tmp_path: Path) -> None:
    loud = FILES | {"mychip/__init__.py": "raise RuntimeError('imported')\n"}
    install(tmp_path / "site", build_wheel(tmp_path, loud))
    done = run(tmp_path / "site", "explain", "--json", "platform=cpu", "model=tiny")
    assert done.returncode == 0, done.stderr


def test_a_port_that_fails_to_load_is_named(tmp_path: Path) -> None:
    needy = FILES | {"mychip/provider.py": "import mychip_driver\n"}
    install(tmp_path / "site", build_wheel(tmp_path, needy))
    done = run(tmp_path / "site", "complete", "hello", "platform=mychip", "model=tiny")
    assert done.returncode == 2
    assert "'mychip_driver', which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_packages_with_one_name_are_refused(tmp_path: Path) -> None:
    other = {f"rival{k.removeprefix('mychip')}": v for k, v in FILES.items()}
    wheels = build_wheel(tmp_path, FILES), build_wheel(tmp_path, other, "rival_port")
    install(tmp_path / "site", *wheels)
    done = run(tmp_path / "site", "explain", "platform=cpu")
    assert done.returncode == 2
    assert "two packages are installed as port 'mychip'" in done.stderr
    assert "mychip_port" in done.stderr
    assert "rival_port" in done.stderr
