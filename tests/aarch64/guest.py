"""The C++ kernels compiled for aarch64 and run by QEMU, behind the names of a ctypes library."""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vllm_di.cache import obtain
from vllm_di.components.communicator import shared_memory
from vllm_di.components.ops import cpu
from vllm_di.kernels import build, isa, memory
from vllm_di.kernels.build import Built

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = "/usr/aarch64-linux-gnu"
"""Where Debian's cross compiler has the libraries of aarch64."""
PACKAGES = "g++-aarch64-linux-gnu qemu-user"
CPUS = {"generic": "cortex-a53", "neon": "neoverse-n1"}
"""Instruction sets to CPUs that have them, and nothing of the next better one: another instruction
ends the guest. The others run on all that QEMU knows."""
SOURCE = Path(__file__).with_name("guest.cpp")
ADDRESS, SIZE = 1 << 36, 4 << 30
"""Of the memory that is shared: where neither process has anything else. Pages that nobody touched
take none."""
MAP_FIXED_NOREPLACE = 0x100000
CALL = struct.Struct("<64s32q8f")
"""``Call`` of guest.cpp: name, whole numbers and pointers, floats."""


def missing() -> list[str]:
    """The programs that are not on the PATH."""
    return [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


class Arena:
    """Memory at one address here and in every guest, handed out in powers of two."""

    def __init__(self) -> None:
        self.file = os.memfd_create("vllm-di-arena")
        os.ftruncate(self.file, SIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_SHARED | MAP_FIXED_NOREPLACE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if libc.mmap(ADDRESS, SIZE, access, flags, self.file, 0) != ADDRESS:
            raise OSError(ctypes.get_errno(), f"{SIZE} bytes at {ADDRESS:#x} cannot be mapped")
        whole = memoryview((ctypes.c_uint8 * SIZE).from_address(ADDRESS))
        self._whole: npt.NDArray[np.uint8] = np.frombuffer(whole, np.uint8)
        self._used = 0
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    def chunk(self, size: int) -> npt.NDArray[np.uint8]:
        """``size`` bytes for good, on a cache line's border."""
        start = self._used
        self._used += -(-size // 64) * 64
        if self._used > SIZE:
            raise MemoryError(f"the arena's {SIZE} bytes are used up")
        return self._whole[start : start + size]

    def moved(self, x: Tensor) -> Tensor:
        """The tensor, or where it lies elsewhere a copy with the same strides, and the same
        values in the gaps."""
        if x.device.type != "cpu" or not x.numel() or self.holds(x.data_ptr()):
            return x
        storage = x.untyped_storage()
        size = storage.nbytes() // x.itemsize * x.itemsize
        kind = max(64, 1 << (size - 1).bit_length())
        free = self._free[kind]
        chunk = free.pop() if free else self.chunk(kind)
        used = chunk[:size]
        # the copy's storage holds `used`: when it dies, no view of the copy is left
        weakref.finalize(used, free.append, chunk)
        ctypes.memmove(used.ctypes.data, storage.data_ptr(), size)
        flat = torch.from_numpy(used).view(x.dtype)
        return flat.as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def holds(address: int) -> bool:
        return ADDRESS <= address < ADDRESS + SIZE


class InArena(TorchDispatchMode):
    """Whatever torch makes lies in the arena."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = arena

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return tree_map_only(Tensor, self._arena.moved, func(*args, **(kwargs or {})))


class GuestLibrary:
    """A library of kernels in a guest. An attribute is a function, as in ctypes.CDLL; one call runs
    at a time. ``files``: descriptors that the guest has too, by the same numbers."""

    def __init__(self, path: Path, name: str, arena: Arena, files: Sequence[int] = ()) -> None:
        self._name, self._arena = str(path), arena
        self._handles: set[int] = set()
        self._lock = threading.Lock()
        command = [EMULATOR, "-L", ROOT, "-cpu", CPUS.get(name, "max")]
        shared = [str(arena.file), str(ADDRESS), str(SIZE)]
        self.process = subprocess.Popen(
            [*command, str(_driver()), str(path), *shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[arena.file, *files],
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )

    def __getattr__(self, name: str) -> GuestFunction:
        if name.startswith("_"):
            raise AttributeError(name)
        function = GuestFunction(self, name)
        setattr(self, name, function)
        return function

    def call(self, name: str, argtypes: Sequence[Any], restype: Any, args: Sequence[Any]) -> Any:
        """As ctypes calls it. Raises RuntimeError where the guest ends instead of an answer, and
        ValueError for a pointer that means nothing there."""
        whole, real = [], []
        for kind, value in zip(argtypes, args, strict=True):
            if kind is ctypes.c_float:
                real.append(float(value))
            else:
                whole.append(self._pointer(value) if kind is ctypes.c_void_p else int(value))
        whole += [0] * (32 - len(whole))
        real += [0.0] * (8 - len(real))
        assert self.process.stdin is not None and self.process.stdout is not None
        with self._lock:
            if self.process.stdin.closed:  # a tape that outlives the session
                return None
            self.process.stdin.write(CALL.pack(name.encode(), *whole, *real))
            self.process.stdin.flush()
            answer = self.process.stdout.read(8)
        if len(answer) < 8:
            raise RuntimeError(f"{name} of {self._name}: QEMU ended with {self.process.wait()}")
        [result] = struct.unpack("<q", answer)
        if restype is None:
            return None
        if restype is ctypes.c_void_p:
            self._handles.add(result)
            return result or None
        return restype(result).value

    def _pointer(self, value: int | None) -> int:
        address = value or 0
        if address and not self._arena.holds(address) and address not in self._handles:
            raise ValueError(f"{address:#x} lies outside of the memory that the guest shares")
        return address

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self._lock:
            self.process.stdin.close()
            self.process.stdout.close()
        self.process.wait()


class GuestFunction:
    """Set ``argtypes`` and ``restype``, then call it."""

    def __init__(self, library: GuestLibrary, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: Sequence[Any] = ()
        self.restype: Any = None

    def __call__(self, *args: Any) -> Any:
        return self._library.call(self._name, self.argtypes, self.restype, args)


@functools.cache
def _driver() -> Path:
    """guest.cpp, compiled."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-di-guest-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / "guest"
    subprocess.run([COMPILER, "-O2", "-std=c++17", SOURCE, "-ldl", "-o", target], check=True)
    return target


class Session:
    """For one run of pytest: this machine passes for an aarch64 whose kernels QEMU runs, and what
    torch makes lies where they can read it."""

    def __init__(self) -> None:
        self.arena = Arena()
        self._mode = InArena(self.arena)
        self._libraries: dict[str, GuestLibrary] = {}

    def start(self) -> None:
        for module, name, value in (
            (isa, "machine", lambda: "aarch64"),
            (isa, "cpu_flags", lambda: isa.NEEDED["neon_bf16"]),
            (build, "find_compiler", lambda: shutil.which(COMPILER)),
            (memory, "_aligned", self.arena.chunk),
            (cpu, "build", self.build),
            (shared_memory, "build", self.build),
        ):
            setattr(module, name, value)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def build(self, name: str, cache: Path, openmp: Path | None) -> Built:
        """In place of ``kernels.build.build``: one guest for each instruction set."""
        if name not in self._libraries:
            self._libraries[name] = self.guest(name)
        return Built(cast(ctypes.CDLL, self._libraries[name]), "by QEMU")

    def guest(self, name: str, files: Sequence[int] = ()) -> GuestLibrary:
        """A guest of its own, which the caller closes."""
        made = build.recipe(name, build.default_cache(), None)
        path = obtain(made.target, lambda to: build.compile_sources(to, made.command, made.runtime))
        return GuestLibrary(path, name, self.arena, files)

    def stop(self) -> None:
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for library in self._libraries.values():
            library.close()


SESSION = pytest.StashKey[Session]()
