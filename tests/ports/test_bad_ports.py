"""Ports that do not keep their word: an error at the start with file and key, never another
platform in its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.ports.packages import FILES, installed

from vllm_di import LLM, SamplingParams
from vllm_di.containers.assembly import assemble
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import ConfigError, PortError

PLATFORM, PROVIDER = "mychip/conf/platform/mychip.yaml", "mychip/provider.py"
ASKED = ["platform=mychip", "model=tiny", "model.dtype=float32"]

OPS = """
from vllm_di.components.ops.torch import TorchOps


class MyOps(TorchOps):
    implements = frozenset({"rms_norm"})

    def __init__(self) -> None: ...

    def rms_norm(self, x, weight, eps):
        return super().rms_norm(x, weight, eps)
"""
OPS_YAML = """\
# MyChip's kernels.
defaults:
  - base
  - _self_

_target_: vllm_di.components.ops.table.SelectedOps
library:
  _target_: mychip.ops.MyOps
"""
WITH_OPS = FILES | {
    "mychip/ops.py": OPS,
    "mychip/conf/ops/mychip.yaml": OPS_YAML,
    PLATFORM: FILES[PLATFORM].replace("defaults:\n", "defaults:\n  - override /ops: mychip\n")
    + "  capabilities:\n    ops: [rms_norm]\n",
}


def changed(path: str, old: str, new: str) -> dict[str, str]:
    assert old in WITH_OPS[path]
    return WITH_OPS | {path: WITH_OPS[path].replace(old, new)}


def start(*overrides: str) -> list[int]:
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(overrides=[*ASKED, *overrides]) as llm:
        return llm.generate("hello", greedy)[0].outputs[0].token_ids


def test_a_good_one_starts(tmp_path: Path) -> None:
    with installed(tmp_path, WITH_OPS):
        assert start() == start("ops=torch", "attention=sdpa")


NORM = "return super().rms_norm(x, weight, eps)"
BAD = {
    "claims an op that is none": (
        changed("mychip/ops.py", '{"rms_norm"}', '{"rms_norm", "silu_and_mull"}'),
        "conf/ops/mychip.yaml:8: ops: MyOps.implements names 'silu_and_mull', which is no op; "
        "did you mean 'silu_and_mul'",
    ),
    "claims an op whose method it lacks": (
        changed("mychip/ops.py", '{"rms_norm"}', '{"rms_norm", "linear"}'),
        "conf/ops/mychip.yaml:8: ops: MyOps.implements names 'linear', but MyOps has no method",
    ),
    "declares an op that its library lacks": (
        changed(PLATFORM, "ops: [rms_norm]", "ops: [rms_norm, linear]"),
        "conf/platform/mychip.yaml:14: platform.capabilities.ops claims linear, but the library",
    ),
    "declares an op that is none": (
        changed(PLATFORM, "ops: [rms_norm]", "ops: [rmsnorm]"),
        "conf/platform/mychip.yaml:14: platform.capabilities.ops: no op 'rmsnorm'",
    ),
    "returns a wrong shape": (
        changed("mychip/ops.py", NORM, f"{NORM}[:, :-1]"),
        "conf/ops/mychip.yaml:8: ops.rms_norm: mychip.ops.MyOps gives a result of shape "
        "[3, 127] and torch.float32; expected shape [3, 128]",
    ),
    "returns a wrong dtype": (
        changed("mychip/ops.py", NORM, f"{NORM}.half()"),
        "ops.rms_norm: mychip.ops.MyOps gives a result of shape [3, 128] and torch.float16",
    ),
    "returns nothing": (
        changed("mychip/ops.py", NORM, "pass"),
        "ops.rms_norm: mychip.ops.MyOps gives a result of shape [] and <class 'NoneType'>",
    ),
    "fails": (
        changed("mychip/ops.py", NORM, "raise RuntimeError('no such kernel\\nno more')"),
        "ops.rms_norm: mychip.ops.MyOps fails on a small input: RuntimeError: no such kernel",
    ),
    "returns attention of a wrong shape": (
        changed(PROVIDER, "        return out\n", "        return out.flatten(1)\n"),
        "conf/attention/mychip.yaml:2: attention: mychip.provider.MyChipAttention gives a result "
        "of shape [3, ",
    ),
    "needs an absent driver": (
        changed("mychip/ops.py", "class MyOps", "import mychip_driver\n\nclass MyOps"),
        "conf/ops/mychip.yaml:8: ops.library: mychip.ops needs the package 'mychip_driver', "
        "which is not installed",
    ),
    "pins another interface version": (
        changed(PLATFORM, '"1.0"', '"0.9"'),
        "conf/platform/mychip.yaml:11: platform.interface: mychip was written for interfaces 0.9, "
        "this engine has ",
    ),
    "pins none": (
        changed(PLATFORM, '  interface: "1.0"', ""),
        "conf/platform/mychip.yaml:8: platform.interface: a port out of tree must say which",
    ),
    "has a wrong key": (
        changed(PLATFORM, "  detect: {}", "  detect: {}\n  maintainr: me"),
        "platform.maintainr: no such key",
    ),
    "calls itself by another's name": (
        changed(PLATFORM, "name: mychip", "name: cpu"),
        "conf/platform/mychip.yaml:9: platform.name is 'cpu', but the file makes it the option",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_port_that(what: str, tmp_path: Path) -> None:
    files, message = BAD[what]
    wanted = pytest.raises(ConfigError, match=re.escape(message))
    with installed(tmp_path, files), wanted:
        start()


def test_what_the_user_chose_instead_is_not_held_against_the_port(tmp_path: Path) -> None:
    files = changed(PLATFORM, "ops: [rms_norm]", "ops: [rms_norm, linear]")
    with installed(tmp_path, files):
        assert start("ops=torch") == start("ops.linear=torch")


def test_a_port_with_the_name_of_a_platform_of_ours_is_refused(tmp_path: Path) -> None:
    with (
        installed(tmp_path, FILES, port="cpu"),
        pytest.raises(PortError, match=r"mychip_port is installed as port 'cpu'.*platform=cpu"),
    ):
        ConfigFiles.find()


def test_an_option_of_ours_cannot_be_replaced(tmp_path: Path) -> None:
    files = FILES | {"mychip/conf/attention/sdpa.yaml": FILES["mychip/conf/attention/mychip.yaml"]}
    with (
        installed(tmp_path, files),
        pytest.raises(PortError, match=r"option attention=sdpa is defined twice: .*rename one"),
    ):
        assemble(ASKED)
