"""Compiles the simulated device against this torch, on first use, and caches the result."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import shutil
import subprocess
from pathlib import Path

import torch

from vllm_di.kernels.build import BuildError, default_cache, load_library
from vllm_di.progress import tell

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-psabi")


def load(cache: Path | None = None) -> ctypes.CDLL:
    """The compiled library, loaded. Raises BuildError when it cannot be built here.

    Its name in the cache (the user's, by default) is a hash of the sources, the compiler and
    torch's version; processes that build at once wait for the first.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError(
            "the simulated device is C++ and there is no compiler: neither g++ nor clang++ is on "
            "the PATH"
        )
    target = (cache or default_cache()) / f"simulated-{_digest(compiler)}.so"
    built = load_library(target, lambda to: _compile(compiler, to))
    if built.note:
        log.warning("the simulated device was %s", built.note)
    return built.library


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256()
    for part in (compiler, version, torch.__version__, *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in (*sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cpp"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, target: Path) -> None:
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    command = [
        compiler,
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}",
        *(str(source) for source in sorted(SOURCES.glob("*.cpp"))),
        f"-L{root / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        str(target),
    ]
    tell("compiling the simulated device (once for this machine and torch)")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        why = lines[0] if lines else done.stderr[-300:] or "no message"
        raise BuildError(f"{Path(compiler).name} failed on the simulated device: {why}")
    tell("the simulated device is compiled; loading")
