"""Compiles the C++ kernels on first use and caches the result. No torch headers: a plain C ABI,
called through ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffast-math",
    "-fno-finite-math-only",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
ISA_FLAGS = {
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "generic": (),
}
"""Instruction sets, best first, with the flags that a kernel of it is compiled with."""
NEEDED = {
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "generic": set(),
}


class BuildError(Exception):
    """The kernels cannot be built here; the message says why."""


def usable_isas() -> list[str]:
    """The instruction sets that this CPU has, best first."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    flags = set(next((r for r in rows if r.startswith("flags")), "").partition(":")[2].split())
    return [isa for isa, needed in NEEDED.items() if needed <= flags]


def build(isa: str, cache: Path, openmp: Path | None) -> ctypes.CDLL:
    """The library for one instruction set, from the cache or compiled now. Raises BuildError.

    ``openmp`` is the OpenMP runtime that the process has loaded already; linking it keeps one
    thread pool. The cache key is a hash of sources, flags, compiler and runtime. Two processes that
    build at once wait for each other; where the cache cannot be written a folder of this process
    alone is used.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler: neither g++ nor clang++ is on the PATH")
    sources = sorted(SOURCES.glob("*.cpp"))
    flags = [*COMMON_FLAGS, *ISA_FLAGS[isa]]
    digest = hashlib.sha256()
    for part in (compiler, _version(compiler), *flags, str(openmp)):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.glob("*")):
        digest.update(source.read_bytes())
    name = f"cpu-{isa}-{digest.hexdigest()[:20]}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (cache / name).is_file():
                _compile(compiler, flags, sources, openmp, cache / name)
    except OSError:  # a cache that is read-only or full
        cache = Path(tempfile.mkdtemp(prefix="vllm-di-kernels-"))
        try:
            _compile(compiler, flags, sources, openmp, cache / name)
            return ctypes.CDLL(str(cache / name))
        finally:
            shutil.rmtree(cache, ignore_errors=True)
    try:
        return ctypes.CDLL(str(cache / name))
    except OSError as error:
        raise BuildError(f"the compiled library cannot be loaded: {error}") from None


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _compile(
    compiler: str, flags: list[str], sources: list[Path], openmp: Path | None, target: Path
) -> None:
    """Each source on its own, side by side, then one link; renamed into place."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        running = [
            subprocess.Popen(
                [compiler, *flags, "-c", str(source), "-o", str(to)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, to in zip(sources, objects, strict=True)
        ]
        for process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise BuildError(f"{Path(compiler).name} failed: {_first_error(errors)}")
        library = Path(scratch) / "library.so"
        runtime = [str(openmp)] if openmp else ["-fopenmp"]
        command = [compiler, "-shared", *map(str, objects), *runtime, "-lmvec", "-lm"]
        done = subprocess.run(
            [*command, "-o", str(library)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BuildError(f"linking failed: {_first_error(done.stderr)}")
        os.replace(library, target)


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0] if lines else "no message"
