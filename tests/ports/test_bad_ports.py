"""Ports that do not keep their word: an error at the start with file and key, never another
platform in its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.ports.packages import FILES, installed

from vllm_di import LLM, SamplingParams
from vllm_di.cli import main
from vllm_di.errors import ConfigError

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
        changed(PLATFORM, '"2.0"', '"1.1"'),
        "conf/platform/mychip.yaml:11: platform.interface: mychip was written for interfaces 1.1, "
        "this engine has ",
    ),
    "pins none": (
        changed(PLATFORM, '  interface: "2.0"', ""),
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


class Bad(NamedTuple):
    """A port that cannot be used, and what is said where it is asked for."""

    files: dict[str, str]
    message: str
    asked: tuple[str, ...] = tuple(ASKED)
    names: tuple[tuple[str, str], ...] = ()
    """Of its distribution."""


PLACE = "conf/communicator/mychip.yaml:2: communicator: mychip.provider"
"""The first slot that names the module."""
NAMED = "conf/attention/mychip.yaml:2: attention: mychip.provider.MyChipAttention"
IMPORT = "from pathlib import Path\n"
INIT = "self.kv_layout, self.log = kv_layout, log"
TWICE = {"mychip/conf/attention/sdpa.yaml": FILES["mychip/conf/attention/mychip.yaml"]}
WITH_BASE = WITH_OPS | {"mychip/conf/ops/base.yaml": "eps: 1\n"}
BROKEN = {
    "has a syntax error": Bad(
        changed(PROVIDER, IMPORT, "def broken(:\n"),
        f"{PLACE} cannot be imported: SyntaxError: invalid syntax (provider.py, line 4)",
    ),
    "lacks a library": Bad(
        changed(PROVIDER, IMPORT, f"{IMPORT}import ctypes\nctypes.CDLL('libmychip.so.3')\n"),
        f"{PLACE} cannot be imported: OSError: libmychip.so.3: cannot open shared object file",
    ),
    "needs a package": Bad(
        changed(PROVIDER, IMPORT, f"{IMPORT}import mychip_driver\n"),
        f"{PLACE} needs the package 'mychip_driver', which is not installed",
    ),
    "needs another name of a package": Bad(
        changed(PROVIDER, IMPORT, "from pathlib import Path, Road\n"),
        f"{PLACE} cannot be imported: ImportError: cannot import name 'Road' from 'pathlib'",
    ),
    "has a driver too old": Bad(
        changed(PROVIDER, IMPORT, f"{IMPORT}raise RuntimeError('driver\\n  too old')\n"),
        f"{PLACE} cannot be imported: RuntimeError: driver too old",
    ),
    "ends the process when imported": Bad(
        changed(PROVIDER, IMPORT, f"{IMPORT}raise SystemExit('no device')\n"),
        f"{PLACE} cannot be imported: SystemExit: no device",
    ),
    "fails to import its package": Bad(
        WITH_OPS | {"mychip/__init__.py": "1 / 0\n"},
        "ops.library: mychip.ops cannot be imported: ZeroDivisionError: division by zero",
    ),
    "computes its classes and fails": Bad(
        WITH_OPS | {PROVIDER: "def __getattr__(name):\n    raise ValueError(name)\n"},
        f"{PLACE} cannot give MyChipCommunicator: ValueError: ",
    ),
    "fails to build": Bad(
        changed(PROVIDER, INIT, "raise OSError(19, 'No such device')"),
        f"{NAMED} cannot be built: OSError: [Errno 19] No such device",
    ),
    "ends the process when built": Bad(
        changed(PROVIDER, INIT, "raise SystemExit(3)"), f"{NAMED} cannot be built: SystemExit: 3"
    ),
    "fails an assertion without a word": Bad(
        changed(PROVIDER, INIT, "assert False"), f"{NAMED} cannot be built: AssertionError"
    ),
    "has annotations that mean nothing": Bad(
        changed(PROVIDER, "log: str | None, loud: bool", "log: 'Strnig', loud: bool"),
        "attention: the constructor of mychip.provider.MyChipAttention cannot be read: NameError",
    ),
    "has a platform that is not YAML": Bad(
        WITH_OPS | {PLATFORM: "platform: {name: mychip\n"}, "mychip.yaml"
    ),
    "has a platform in another encoding": Bad(
        WITH_OPS | {PLATFORM: "\x00"}, "platform/mychip.yaml"
    ),
    "has a platform that is a list": Bad(
        WITH_OPS | {PLATFORM: "- mychip\n"}, "platform/mychip.yaml: platform: expected a mapping"
    ),
    "names an option that is not there": Bad(
        changed(PLATFORM, "override /attention: mychip", "override /attention: mychop"),
        "conf/platform/mychip.yaml:5: defaults: group 'attention' has no option 'mychop'; it has ",
    ),
    "includes what is not there": Bad(
        changed("mychip/conf/ops/mychip.yaml", "base", "bass"),
        "conf/ops/mychip.yaml:3: defaults: group 'ops' has no option 'bass'; it has ",
    ),
    "has no conf": Bad(
        {"mychip/__init__.py": ""},
        "port 'mychip' (mychip_port) is installed but has no conf/ folder",
    ),
    "bears the name of a platform of ours": Bad(
        FILES,
        "mychip_port is installed as port 'openvino', but platform=openvino is defined in conf/",
        ("platform=openvino", *ASKED[1:]),
        (("port", "openvino"),),
    ),
    "has an option of ours": Bad(
        WITH_OPS | TWICE,
        "command line: attention=sdpa: option attention=sdpa is defined twice: conf/attention/",
        ("platform=cpu", "attention=sdpa"),
    ),
    "shares what our options share": Bad(WITH_BASE, "option ops=base is defined twice: conf/ops/"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_where_it_is_used_a_port_that(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with slot, place and text."""
    bad = BROKEN[what]
    with installed(tmp_path, bad.files, **dict(bad.names)):
        status, _, err = call(capsys, "complete", "hello", *bad.asked)
    said = [s for s in err.splitlines() if s.startswith("vllm-di: ") and "warning: " not in s]
    assert (status, len(said)) == (2, 1), err
    assert bad.message in said[0], err
    assert "Traceback" not in err


@pytest.mark.parametrize("what", BROKEN)
def test_elsewhere_nobody_is_stopped_by_a_port_that(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, others = BROKEN[what], [["--help"], ["help"], ["help", "platform"], ["help", "ops"]]
    others += [["matrix"], ["explain", "--slot", "attention"], ["__complete", "serve", "platform="]]
    cpu = ["platform=cpu", "model=tiny", "ops=torch"]
    others += [["explain", *cpu], ["config", "show", *cpu], ["serve", "--help"]]
    with installed(tmp_path, bad.files, **dict(bad.names)):
        for words in others:
            status, out, err = call(capsys, *words)
            assert (status, "Traceback" in err) == (0, False), (words, err)
            assert out, words
            wanted = "defined" in bad.message or "no conf/" in bad.message
            if words[0] in ("help", "matrix", "config"):
                assert ("warning: " in err) >= wanted, (words, err)


def test_what_one_lists_of_a_port_that_is_no_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``help platform`` and ``matrix`` show the others, and say what is missing."""
    with installed(tmp_path, BROKEN["has a platform that is not YAML"].files):
        _, out, _ = call(capsys, "help", "platform")
        assert "platform=mychip: " in out
        assert "platform=openvino: " in out
        _, out, err = call(capsys, "matrix")
        assert "openvino" in out
        assert "warning: platform mychip is left out: " in err


def test_a_report_of_a_port_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed(tmp_path, WITH_OPS | {"mychip/reports/mychip.json": "{"}):
        status, _, err = call(capsys, "matrix")
        assert (status, "a report is left out: " in err) == (0, True)
        status, _, err = call(capsys, "config", "show", *ASKED)
        assert (status, "mychip.json: this conformance report cannot be read" in err) == (0, True)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """-> exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err
