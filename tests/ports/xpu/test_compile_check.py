"""How Intel's compiler is called and read. Here it is a script that writes a binary; the real one
runs in an environment of its own (``make test-xpu``)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.ports.xpu.zebin import zebin

from vllm_di.cli import main
from vllm_di.errors import PortError
from vllm_di.kernels.triton import code_objects
from vllm_di.kernels.triton.code_objects import Usage, code_bytes, compiler_versions, usage
from vllm_di.kernels.triton.compile import Compiler
from vllm_di.kernels.triton.targets import TARGETS
from vllm_di.kernels.triton.tiles import tiling_of

ROOT = Path(__file__).parents[3]
COMPILER = """#!{python}
import sys
sys.path[:0] = [{root!r}]
from tests.ports.xpu.zebin import zebin
words = sys.argv[1:]
if words[0] == "query":
    print("26.27.039122")
    sys.exit()
given = dict(zip(words, words[1:]))
if given["-device"] != "bmg":
    sys.exit("no such device")
large = "256-GRF" in given["-options"]
open(given["-o"], "wb").write(zebin(grf_count=256 if large else 128, spill_size={spill}, code=96))
"""


@pytest.fixture
def ocloc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its path; what it says of spills is to be written first."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return tmp_path / "ocloc"


def write(file: Path, spill: str) -> None:
    python = Path(sys.base_prefix) / "bin/python3"
    file.write_text(COMPILER.format(python=python, root=str(ROOT), spill=spill))
    file.chmod(0o755)


def test_registers_and_spills_are_those_of_a_lane() -> None:
    """A register holds a value of 4 bytes for each of 16 lanes, or half a value for 32."""
    narrow = code_objects._intel(zebin(simd_size=16, grf_count=256, spill_size=15808), 2048)
    assert narrow == Usage(256, 247, 256, 2048, 64)
    wide = code_objects._intel(zebin(simd_size=32, spill_size=1216), 0)
    assert wide == Usage(64, 10, 128, 0, 64)
    assert code_bytes(zebin(code=1000)) == 1000


def test_code_that_does_not_say_what_it_takes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no section \.ze_info"):
        code_objects._intel(zebin().replace(b".ze_info", b".ze_none"), 0)
    with pytest.raises(ValueError, match="has no grf_count"):
        code_objects._intel(zebin().replace(b"grf_count", b"grf_other"), 0)


@pytest.mark.parametrize(
    ("spill", "registers", "spilled"),
    [
        ("0", 128, 0),
        ("640", 128, 10),  # too few for the driver to build it again
        ("0 if large else 15808", 256, 0),
        ("6400 if large else 15808", 256, 100),
    ],
)
def test_what_spills_is_built_with_the_large_register_file(
    ocloc: Path, spill: str, registers: int, spilled: int
) -> None:
    write(ocloc, spill)
    stages = {"spv": b"SPIR-V"}
    assert usage(stages, "bmg", 512) == Usage(registers, spilled, 256, 512, 96)
    assert stages["zebin"]
    assert compiler_versions() == {"ocloc": "26.27.039122"}


def test_what_the_compiler_refuses_is_told(ocloc: Path) -> None:
    write(ocloc, "0")
    with pytest.raises(ValueError, match="ocloc failed: no such device"):
        usage({"spv": b"SPIR-V"}, "xe9", 0)


def test_a_compiler_that_is_absent_is_named_with_the_way_to_it(
    ocloc: Path,
) -> None:
    with pytest.raises(
        PortError, match=r"compiles for amd, nvidia, and not for xpu: .*make xpu-env"
    ):
        Compiler("pvc")
    with pytest.raises(PortError, match=r"intel-ocloc.*make xpu-env"):
        code_objects.ocloc()
    assert compiler_versions() == {}


def test_a_machine_without_it_runs_nothing_and_says_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["conform", "platform=xpu", "--only", "compile"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "not-run" in out
    assert "NOT RUN: triton" in out
    assert "make xpu-env" in out
    assert "within their bars  pass" not in out


def test_tiles_of_pvc_hold_their_share_of_rows() -> None:
    """A matrix product of Xe has 8 rows: a warp that holds 16 spills."""
    for name in ("pvc", "bmg"):
        assert TARGETS[name].spilled == 0
        for rows in (4, 64, 4096):
            tile = tiling_of(name)[1].tile(128, 4, rows, 2)
            assert tile.rows // min(tile.num_warps, tile.rows // 8) == 8
