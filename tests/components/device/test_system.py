"""Control groups and /proc as folders of our own making."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from vllm_di.components.device import system

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n"


def write(root: Path, files: dict[str, str | int]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def machine(root: Path, groups: str, files: dict[str, str | int]) -> tuple[Path, Path]:
    write(root / "proc", {"meminfo": MEMINFO, "self/cgroup": groups})
    write(root / "cgroup", files)
    return root / "proc", root / "cgroup"


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"memory.max": "max", "memory.current": 5}
    assert system.memory(*machine(tmp_path, "0::/", files)) == (8 * GIB, 16 * GIB)


def test_a_limit_of_version_2_with_its_cache_given_back(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "memory.max": 4 * GIB,
        "memory.current": 3 * GIB,
        "memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}",
    }
    assert system.memory(*machine(tmp_path, "0::/", files)) == (3 * GIB, 4 * GIB)


def test_the_tightest_group_around_the_process_counts(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "a/memory.max": 2 * GIB,
        "a/memory.current": GIB,
        "a/b/memory.max": "max",
        "a/b/memory.current": GIB,
        "other/memory.max": 1,
        "other/memory.current": 1,
    }
    assert system.memory(*machine(tmp_path, "0::/a/b", files)) == (GIB, 2 * GIB)


def test_a_limit_of_version_1(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "memory/job/memory.limit_in_bytes": 6 * GIB,
        "memory/job/memory.usage_in_bytes": 2 * GIB,
        "memory/memory.limit_in_bytes": 2**63 - 4096,
        "memory/memory.usage_in_bytes": 9 * GIB,
    }
    groups = "3:cpu,cpuacct:/job\n2:memory:/job"
    assert system.memory(*machine(tmp_path, groups, files)) == (4 * GIB, 6 * GIB)


def test_a_group_above_its_limit_has_nothing_free(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"memory.max": GIB, "memory.current": 2 * GIB}
    assert system.memory(*machine(tmp_path, "0::/", files)) == (0, GIB)


def test_cores_are_cut_by_the_quota(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert system.usable_cores(*machine(tmp_path / "a", "0::/", {"cpu.max": "max 100000"})) == cores
    assert system.usable_cores(*machine(tmp_path / "b", "0::/", {"cpu.max": "50000 100000"})) == 1
    wide: dict[str, str | int] = {"cpu.max": f"{(cores + 4) * 1000} 1000"}
    assert system.usable_cores(*machine(tmp_path / "c", "0::/", wide)) == cores
    old: dict[str, str | int] = {"cpu/cpu.cfs_quota_us": 1000, "cpu/cpu.cfs_period_us": 1000}
    assert system.usable_cores(*machine(tmp_path / "d", "3:cpu:/", old)) == 1
    free: dict[str, str | int] = {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 1000}
    assert system.usable_cores(*machine(tmp_path / "e", "3:cpu:/", free)) == cores


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    free, total = system.memory(tmp_path, tmp_path)
    assert free == total > 0
    assert system.usable_cores(tmp_path, tmp_path) >= 1
    assert system.resident_bytes(tmp_path) == 0
    assert system.cpu_flags(tmp_path) == set()


def test_flags_of_x86_and_arm(tmp_path: Path) -> None:
    write(tmp_path / "x86", {"cpuinfo": "processor : 0\nflags\t\t: sse avx512_bf16\nflags: no"})
    assert system.cpu_flags(tmp_path / "x86") == {"sse", "avx512_bf16"}
    write(tmp_path / "arm", {"cpuinfo": "processor : 0\nFeatures\t: asimd bf16"})
    assert system.cpu_flags(tmp_path / "arm") == {"asimd", "bf16"}


def test_the_processor_s_name(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "processor : 0\nmodel name\t: Chip 9 @ 3 GHz\nmodel name: no"})
    assert system.cpu_name(tmp_path) == "Chip 9 @ 3 GHz"
    assert system.cpu_name(tmp_path / "none") == platform.machine()


def test_this_machine() -> None:
    free, total = system.memory()
    assert 0 < free <= total
    assert 0 < system.resident_bytes() <= total


def test_what_was_freed_between_blocks_that_stay_goes_back() -> None:
    """64 MiB, of which every 64th block stays."""
    blocks = [bytes(16 << 10) for _ in range(4096)]
    kept = blocks[::64]
    held = system.resident_bytes()
    blocks.clear()
    system.return_freed_memory()
    assert len(kept) == 64
    assert held - system.resident_bytes() > 48 << 20
