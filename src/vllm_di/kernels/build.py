"""Compiles the C++ kernels on first use and caches the result. No torch headers: a plain C ABI,
called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from vllm_di.cache import is_whole, obtain, user_cache
from vllm_di.kernels.isa import (
    AMX,
    ISA_FLAGS,
    compiler_lacks_tiles,
    find_compiler,
    first_error,
    flags_of,
    isas_of,
    machine,
)
from vllm_di.progress import tell

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
COMMON_FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
"""NaN and infinities keep their meaning: no -ffast-math."""

COMPILING = "compiling kernels (once for this machine)"


class BuildError(Exception):
    """The kernels cannot be built here; the message says why."""


class Built(NamedTuple):
    library: ctypes.CDLL
    note: str
    """What a person should know of it: that the cache could not be used, say. Mostly empty."""


def default_cache() -> Path:
    """``vllm-di/kernels`` in the user's cache folder. Raises BuildError where the user has none."""
    try:
        return user_cache() / "kernels"
    except OSError as error:
        raise BuildError(str(error)) from None


def loaded_openmp() -> Path | None:
    """The OpenMP runtime that this process has loaded already (torch brings one)."""
    try:
        rows = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (Path(row[row.index("/") :]) for row in rows if "/" in row)
    return next((p for p in paths if p.name.startswith(("libgomp", "libiomp", "libomp"))), None)


def prebuilt(isa: str, folder: Path) -> Built | None:
    """The library for one instruction set that ``main`` wrote for these sources, if it is there and
    whole."""
    path = folder / f"cpu-{isa}-{_sources()}.so"
    if not is_whole(path):
        return None
    try:
        return Built(ctypes.CDLL(str(path)), f"prebuilt in {folder}")
    except OSError as error:
        log.warning("%s cannot be loaded: %s", path, error)
        return None


class Recipe(NamedTuple):
    """How a library is made."""

    target: Path
    """Its place in the cache."""
    command: list[str]
    runtime: str
    """What it is linked with for OpenMP."""


def build(isa: str, cache: Path, openmp: Path | None) -> Built:
    """The library for one instruction set, from the cache or compiled now. Raises BuildError.

    It is linked with ``openmp``, so that one pool of threads serves it and torch. Processes that
    build at once wait for the first; where the cache cannot be written, the library is this
    process's alone.
    """
    made = recipe(isa, cache, openmp)
    return load_library(made.target, lambda to: compile_sources(to, made.command, made.runtime))


def recipe(isa: str, cache: Path, openmp: Path | None) -> Recipe:
    """How ``build`` makes it. The name in the cache is a hash of sources, flags, compiler and
    runtime. Raises BuildError where there is no compiler."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler: neither g++ nor clang++ is on the PATH")
    clang = Path(compiler).name.startswith("clang")
    if openmp is None or (clang and openmp.name.startswith("libgomp")):
        runtime = "-fopenmp"  # clang's code does not run on GNU's runtime
    else:
        runtime = str(openmp)
    flags = [*COMMON_FLAGS, *flags_of(isa)]
    digest = hashlib.sha256(_sources().encode())
    for part in (compiler, _version(compiler), *flags, runtime):
        digest.update(part.encode() + b"\0")
    target = cache / f"cpu-{isa}-{digest.hexdigest()[:20]}.so"
    return Recipe(target, [compiler, *flags], runtime)


def load_library(target: Path, compile: Callable[[Path], object]) -> Built:
    """The library at ``target`` in the cache; ``compile`` writes it where it is not there, or not
    whole. Where the cache cannot be used, the library is this process's alone and the note says
    why. Raises BuildError."""
    try:
        with tempfile.TemporaryDirectory(prefix="vllm-di-kernels-") as scratch:
            own = Path(scratch) / target.name

            def make(to: Path) -> None:
                compile(own)
                shutil.copyfile(own, to)

            try:
                return Built(ctypes.CDLL(str(obtain(target, make))), "")
            except OSError as error:  # read-only, full, or mounted so that nothing in it may run
                why = error.strerror or error
                note = f"compiled for this process alone: {target.parent}: {why}"
            if not own.is_file():
                compile(own)
            return Built(ctypes.CDLL(str(own)), note)
    except OSError as error:
        raise BuildError(f"the kernels can be stored nowhere: {error}") from None


def _sources() -> str:
    """A hash of all sources."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def compile_sources(target: Path, command: list[str], runtime: str) -> None:
    """Each source on its own, side by side, then one link. ``progress`` hears how many are done."""
    with tempfile.TemporaryDirectory(prefix="vllm-di-build-") as scratch:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        compiler, total = Path(command[0]).name, len(sources)
        tell(f"{COMPILING}: 0 of {total} units")
        with ThreadPoolExecutor(max(total, 1)) as pool:
            units = [
                pool.submit(
                    subprocess.run,
                    [*command, "-c", str(source), "-o", to],
                    capture_output=True,
                    text=True,
                )
                for source, to in zip(sources, objects, strict=True)
            ]
            for count, _ in enumerate(as_completed(units), 1):
                tell(f"{COMPILING}: {count} of {total} units")
        for unit in units:
            if unit.result().returncode:
                raise BuildError(f"{compiler} failed: {first_error(unit.result().stderr)}")
        link = [command[0], "-shared", *objects, runtime, "-o", str(target)]
        done = subprocess.run(link, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{compiler} failed to link: {first_error(done.stderr)}")
    tell("kernels are compiled; loading")


def main() -> None:
    """``python -m vllm_di.kernels.build FOLDER``: every instruction set of this architecture, to be
    shipped."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m vllm_di.kernels.build FOLDER")
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit("no C++ compiler: neither g++ nor clang++ is on the PATH")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for isa in isas_of(machine()):
        if isa == AMX and (why := compiler_lacks_tiles()):
            sys.stdout.write(f"no cpu-{isa}: {why}\n")
            continue
        target = folder / f"cpu-{isa}-{_sources()}.so"
        command = [compiler, *COMMON_FLAGS, *ISA_FLAGS[isa]]
        obtain(target, functools.partial(compile_sources, command=command, runtime="-fopenmp"))
        sys.stdout.write(f"{target}\n")


if __name__ == "__main__":
    main()
