"""Compiles the simulated device against this torch, on first use, and caches the result."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from vllm_di.kernels.build import BuildError, default_cache

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
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                _compile(compiler, target)
    return ctypes.CDLL(str(target))


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256()
    for part in (compiler, version, torch.__version__, *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in (*sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cpp"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, target: Path) -> None:
    """In a folder beside ``target``, then renamed into place."""
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        library = Path(scratch) / target.name
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
            str(library),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            why = lines[0] if lines else done.stderr[-300:] or "no message"
            raise BuildError(f"{Path(compiler).name} failed on the simulated device: {why}")
        os.replace(library, target)
