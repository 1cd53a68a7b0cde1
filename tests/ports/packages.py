"""A port in a package of its own, as files and as a wheel."""

from __future__ import annotations

import base64
import hashlib
import importlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
  interface: "2.0"  # the minor before is served too
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


@contextmanager
def installed(site: Path, files: dict[str, str], **names: str) -> Iterator[None]:
    """The port's package on this process's path, and forgotten afterwards. A wheel that is unpacked
    is installed."""
    with zipfile.ZipFile(build_wheel(site, files, **names)) as wheel:
        wheel.extractall(site)
    package = next(iter(files)).split("/")[0]
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        for module in [m for m in sys.modules if m.split(".")[0] == package]:
            del sys.modules[module]
