"""The way to multiply is chosen by figures that are measured once for a CPU."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import OpLibrary
from vllm_di.components.ops import cpu_paths
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.components.ops.cpu_candidates import candidates
from vllm_di.components.ops.cpu_paths import (
    ROUNDS,
    ROWS,
    Candidate,
    Figure,
    Measured,
    kept,
    measure,
    measured,
)
from vllm_di.components.ops.cpu_products import UNMEASURED
from vllm_di.kernels.build import default_cache
from vllm_di.kernels.isa import usable_isas


def figures(own: list[float], tiles: list[float], onednn: float = 1.0) -> Measured:
    """One rate for each of ROWS."""
    rows = [Figure("bf16", "amx", r, rate) for r, rate in zip(ROWS, own, strict=True)]
    rows += [Figure("bf16", "tiles", r, rate) for r, rate in zip(ROWS, tiles, strict=True)]
    rows += [Figure("bf16", "oneDNN", r, onednn) for r in ROWS]
    return Measured("a cpu", 1, rows)


@pytest.mark.parametrize(
    ("tiles", "least"),
    [
        ([9, 9, 9, 9, 9, 9], 1),
        ([1, 1, 9, 9, 9, 9], 8),
        ([9, 9, 1, 9, 9, 9], 16),  # faster by chance at few rows
        ([9, 9, 9, 9, 9, 1], None),
        ([1, 1, 1, 1, 1, 9], 128),
    ],
)
def test_tiles_begin_where_they_stay_faster(tiles: list[float], least: int | None) -> None:
    assert figures([5] * 6, tiles).rows_for_tiles("bf16") == least


def test_without_tiles_there_is_nothing_to_choose() -> None:
    found = Measured("a cpu", 1, [Figure("bf16", "avx2", r, 5) for r in ROWS])
    assert found.rows_for_tiles("bf16") is None


def test_a_faster_library_is_pointed_out() -> None:
    assert "oneDNN is" not in figures([5] * 6, [9] * 6, onednn=10).describe(["bf16"])
    text = figures([5] * 6, [9] * 6, onednn=18).describe(["bf16"])
    assert "amx 5 and 5, tiles 9 and 9, oneDNN 18 and 18" in text
    assert "oneDNN is 2.0 times as fast in bf16: ops.library.rows_for_onednn=128" in text


def test_rounds_end_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    for budget, rounds in ((1e9, ROUNDS), (0.0, 1)):
        monkeypatch.setattr(cpu_paths, "BUDGET", budget)
        runs.clear()
        found = measure([Candidate("bf16", "x", runs.append)], 1)
        assert runs == [*ROWS] * rounds
        assert [(f.rows, f.path) for f in found.figures] == [(r, "x") for r in ROWS]


def absent() -> list[Candidate]:
    raise AssertionError("measured again")


def some() -> list[Candidate]:
    return [Candidate("bf16", "x", lambda rows: None)]


def test_it_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "paths.json"
    found = measured(path, some, 1)
    assert measured(path, absent, 1) == found == kept(path)


@pytest.mark.parametrize("content", ["", "{}", '{"cpu": 3}'])
def test_a_damaged_file_is_measured_again(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "paths.json"
    measured(path, some, 1)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        again = measured(path, some, 1)
    assert "it is not used and will be made anew" in caplog.text
    assert kept(path) == again


def test_a_cache_that_cannot_be_written_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = measured(tmp_path / "file" / "paths.json", some, 1)
    assert len(found.figures) == len(ROWS)
    assert "measured at each start" in caplog.text


def build(
    cache: Path, isa: str, rows_for_tiles: int | None = None, preview: bool = False
) -> OpLibrary:
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    make = CpuOps.preview if preview else CpuOps
    return make(
        device=device,
        isa=isa,  # type: ignore[arg-type]
        compile="require",
        cache=str(cache),
        rows_for_onednn=None,
        rows_for_tiles=rows_for_tiles,
    )


def test_a_library_shows_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as usual, in a cache where nothing is measured yet."""
    isa = next(isa for isa in usable_isas() if isa != "amx")
    monkeypatch.setattr("vllm_di.components.ops.cpu.place", lambda _, name: tmp_path / name)
    usual = default_cache()
    before = build(usual, isa, preview=True).describe()
    assert UNMEASURED in before["linear"]
    rows = build(usual, isa).describe()
    assert f"bf16 {isa} " in rows["linear"]
    assert "oneDNN" in rows["gated_linear"]
    assert f"int8 {isa} " in rows["quantized_linear"]
    assert "GFLOP/s" not in rows["rms_norm"]
    assert build(usual, isa, preview=True).describe() == rows
    assert build(usual, isa).describe() == rows  # not measured again


def test_every_way_multiplies() -> None:
    ops = build(default_cache(), "amx_emulated", rows_for_tiles=3)
    assert isinstance(ops, CpuOps)
    assert "bf16 from 3 rows on by tiles" in ops.describe()["linear"]
    found = candidates(ops)
    ways = {kind: [c.path for c in found if c.dtype == kind] for kind in ("bf16", "int8", "int4")}
    both = ["amx_emulated", "tiles"]
    assert ways == {"bf16": [*both, "oneDNN"], "int8": both, "int4": both}
    for candidate in found:
        candidate.run(2)
