"""Building the kernels: cached, shared by processes, and honest about what went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import OpLibrary
from vllm_di.components.ops.cpu import UNBUILT, CpuOps
from vllm_di.components.ops.cpu_paths import cpu_model
from vllm_di.components.ops.table import SelectedOps
from vllm_di.errors import ConfigError
from vllm_di.kernels.build import (
    COMPILING,
    BuildError,
    build,
    loaded_openmp,
    main,
)
from vllm_di.kernels.isa import (
    ARCHITECTURES,
    ISA_FLAGS,
    NEEDED,
    choose_isa,
    hindrance,
    usable_isas,
)
from vllm_di.progress import shown

SMALL = "generic"
SOURCE = 'extern "C" __attribute__((visibility("default"))) int argmax() { return 7; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small source instead of all, to be quick."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text(SOURCE)
    monkeypatch.setattr("vllm_di.kernels.build.SOURCES", folder)
    return folder


def make(cache: Path, **more: str) -> CpuOps:
    device = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    settings = {"isa": SMALL, "compile": "auto"} | more
    return CpuOps(device, cache=str(cache), rows_for_onednn=None, **settings)  # type: ignore[arg-type]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.mark.usefixtures("sources")
def test_the_result_is_cached(tmp_path: Path) -> None:
    build(SMALL, tmp_path, loaded_openmp())
    [library] = tmp_path.glob("*.so")
    stamp = library.stat().st_mtime_ns
    build(SMALL, tmp_path, loaded_openmp())
    assert library.stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob(".build-*"))


@pytest.mark.usefixtures("sources")
def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    build(SMALL, tmp_path / "a", loaded_openmp())
    [name] = [path.name for path in (tmp_path / "a").glob("*.so")]
    library = tmp_path / "b" / name
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF nothing")
    assert build(SMALL, tmp_path / "b", loaded_openmp()).note == ""
    assert library.stat().st_size > 1000


def test_progress_is_told_where_something_is_compiled(tmp_path: Path, sources: Path) -> None:
    (sources / "two.cpp").write_text("int two() { return 2; }\n")
    told: list[str] = []
    with shown(told.append):
        build(SMALL, tmp_path, loaded_openmp())
    counts = [f"{COMPILING}: {n} of 2 units" for n in range(3)]
    assert told == [*counts, "kernels are compiled; loading"]
    with shown(told.append):
        build(SMALL, tmp_path, loaded_openmp())
    assert len(told) == 4  # from the cache: nothing to say


@pytest.mark.usefixtures("sources")
def test_a_preview_compiles_nothing_and_says_so(tmp_path: Path) -> None:
    device = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    cache = tmp_path / "cache"

    def preview() -> OpLibrary:
        settings = {"isa": SMALL, "compile": "auto", "cache": str(cache)}
        return CpuOps.preview(device=device, rows_for_onednn=None, **settings)

    before = preview()
    assert UNBUILT in before.describe()["linear"]
    assert not cache.exists()
    build(SMALL, cache, loaded_openmp())
    after = preview()
    assert UNBUILT not in after.describe()["linear"]
    assert after.implements == before.implements


@pytest.mark.usefixtures("no_compiler")
def test_a_preview_without_a_compiler_says_what_will_run(tmp_path: Path) -> None:
    device = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    settings = {"isa": SMALL, "compile": "auto", "cache": str(tmp_path)}
    found = CpuOps.preview(device=device, rows_for_onednn=None, **settings)
    assert found.implements == frozenset()
    assert "no C++ compiler" in found.describe()["linear"]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path: Path) -> None:
    ops = make(tmp_path)
    assert ops.implements == frozenset()
    rows = SelectedOps(ops).describe()
    assert rows["linear"].startswith("torch (no C++ compiler")
    with pytest.raises(ConfigError, match=r"compile=require: .*no C\+\+ compiler"):
        make(tmp_path, compile="require")


@pytest.mark.usefixtures("sources")
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho 'x.cpp:1: error: out of cheese' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BuildError, match=r"g\+\+ failed: x\.cpp:1: error: out of cheese"):
        build(SMALL, tmp_path / "cache", loaded_openmp())
    assert "out of cheese" in make(tmp_path / "cache").describe()["linear"]


@pytest.mark.usefixtures("sources")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    built = build(SMALL, blocked, loaded_openmp())
    assert "this process alone" in built.note
    assert built.library.argmax() == 7


def test_processes_that_build_at_once(tmp_path: Path, sources: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vllm_di.kernels import build;"
        f"build.SOURCES = Path({str(sources)!r});"
        f"print(build.build({SMALL!r}, Path(sys.argv[1]), None).note or 'cached')"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [p.communicate()[0].strip() for p in running] == ["cached"] * 3
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_prebuilt_libraries_need_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["build", str(tmp_path)])
    best = next(isa for isa in usable_isas() if not hindrance(isa))
    monkeypatch.setattr("vllm_di.kernels.build.isas_of", lambda _: (best,))
    main()
    monkeypatch.setenv("PATH", "/nowhere")
    ops = make(tmp_path / "cache", isa=best, prebuilt=str(tmp_path))
    assert "linear" in ops.implements
    assert f"prebuilt in {tmp_path}" in ops.describe()["linear"]
    elsewhere = make(tmp_path / "cache", isa=best, prebuilt=str(tmp_path / "no"))
    assert "no C++ compiler" in elsewhere.describe()["linear"]


def test_an_instruction_set_that_the_cpu_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_di.kernels.isa.usable_isas", lambda: ["avx2", "generic"])
    with pytest.raises(ConfigError, match="isa=avx512: this CPU does not have it; it has avx2"):
        make(tmp_path, isa="avx512")


@pytest.mark.parametrize(
    ("machine", "row"), [("x86_64", "flags\t\t: {}"), ("aarch64", "Features\t: {}")]
)
def test_each_architecture_has_its_own(
    monkeypatch: pytest.MonkeyPatch, machine: str, row: str
) -> None:
    """By the flags of the first CPU; without any, plain C++."""
    monkeypatch.setattr("vllm_di.kernels.isa.machine", lambda: machine)
    everything = " ".join(sorted(set().union(*NEEDED.values())))
    for flags, wanted in (("fpu sse2", ["generic"]), (everything, [*ARCHITECTURES[machine]])):
        text = f"processor : 0\n{row.format(flags)}\nprocessor : 1\n{row.format('')}\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text: text)
        assert usable_isas() == wanted


def test_arm_takes_the_best_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three servers: Graviton 1, 2 and 3."""
    monkeypatch.setattr("vllm_di.kernels.isa.machine", lambda: "aarch64")
    first = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
    second = f"{first} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp ssbs"
    third = f"{second} sve bf16 i8mm svebf16 svei8mm"
    for features, wanted in ((first, "generic"), (second, "neon"), (third, "neon_bf16")):
        text = f"processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: {features}\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text: text)
        assert choose_isa() == (wanted, {})


def test_an_unknown_machine_runs_the_generic_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_di.kernels.isa.machine", lambda: "riscv64")
    assert usable_isas() == ["generic"]


def test_every_instruction_set_is_some_machines() -> None:
    listed = {isa for names in ARCHITECTURES.values() for isa in names}
    assert listed == set(NEEDED) == set(ISA_FLAGS)


def test_an_instruction_set_of_another_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = ["neon", "generic"]
    monkeypatch.setattr("vllm_di.kernels.isa.machine", lambda: "aarch64")
    monkeypatch.setattr("vllm_di.kernels.isa.usable_isas", lambda: usable)
    for isa, reason in (
        ("avx2", "is of x86_64, and this machine is aarch64; it has neon, generic"),
        ("neon_bf16", "this CPU does not have it; it has neon, generic"),
    ):
        with pytest.raises(ConfigError, match=f"isa={isa}:? {reason}"):
            make(tmp_path, isa=isa)


def test_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured on one CPU is not taken for another's."""
    arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"
    x86 = "processor : 0\nmodel name : A CPU\nstepping : 2\n\nprocessor : 1\n"
    for text, name in ((arm, "0x41, 0xd0c"), (x86, "A CPU, 2")):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text: text)
        assert cpu_model() == name


def test_the_openmp_of_torch_is_used() -> None:
    import torch  # noqa: F401

    runtime = loaded_openmp()
    assert runtime is not None
    assert runtime.is_file()
