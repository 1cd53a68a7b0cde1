"""Collectives over memory that the ranks of one host share, by our C++ kernels."""

from __future__ import annotations

import array
import contextlib
import hashlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import Communicator, Device, Placement
from vllm_di.errors import ConfigError, EngineDeadError
from vllm_di.kernels.bindings import GroupKernels, Kernel
from vllm_di.kernels.build import BuildError, build, default_cache, loaded_openmp
from vllm_di.kernels.isa import choose_isa

KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.uint8: 4,
    torch.int8: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
}
"""Elements that are summed, by the numbers that the kernels know."""
TROUBLE = {1: "died", 2: "left the group", 3: "did not join in time"}
RANK = struct.Struct("<i")
CREDENTIALS = struct.Struct("3i")
"""Process, user and group of a Unix socket's other end."""


class SharedMemoryCommunicator(Communicator):
    """Sums are taken in the order of ranks, so all ranks get the same bits. One thread of a rank
    may use it at a time.

    A rank waits for its peers by spinning, then asleep. A peer that dies or leaves is noticed in a
    tenth of a second: EngineDeadError, which names it. Nothing has to be cleaned up after a crash:
    the memory has no name and goes with the last process that maps it.
    """

    def __init__(
        self,
        placement: Placement,
        device: Device,
        *,
        piece: str | int,
        spin: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)],
        timeout: Annotated[float, msgspec.Meta(gt=0)],
        cache: str | None,
    ) -> None:
        if not device.on_host:
            raise ConfigError(
                f"communicator=shared_memory: not for tensors on {device.torch_device}"
            )
        if placement.node is not None and placement.node.num_nodes > 1:
            raise ConfigError(
                f"communicator=shared_memory: the {placement.world_size} ranks are on "
                f"{placement.node.num_nodes} nodes, which share no memory; take "
                "communicator=torch_distributed, or executor.strategy=STRICT_PACK"
            )
        self.rank, self.world_size = placement.rank, placement.world_size
        self._group: int | None = None
        self._processes: list[int] = []
        if self.world_size == 1:
            return
        unit = 64 * self.world_size
        size = max(unit, parse_size(piece, "piece") // unit * unit)
        try:
            folder = Path(cache).expanduser() if cache else default_cache()
            self._kernels = GroupKernels(build(choose_isa().isa, folder, loaded_openmp()).library)
        except BuildError as error:
            raise ConfigError(f"communicator=shared_memory needs its kernels: {error}") from None
        if len(os.sched_getaffinity(0)) < self.world_size:
            spin = 0  # a peer may need this core to get on
        total = self._kernels.bytes(self.world_size, size)
        with _joined(placement, total, timeout) as (memory, self._processes):
            watched = array.array("i", self._processes)
            self._group = self._kernels.open(
                memory,
                self.rank,
                self.world_size,
                size,
                1000 * spin,
                int(1e9 * timeout),
                watched.buffer_info()[0],
            )
        if self._group is None:
            self.close()
            raise ConfigError(f"communicator=shared_memory: cannot map {total} bytes")

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.world_size > 1:
            x = x.contiguous()
            self._run(self._kernels.all_reduce, _kind(x), x.data_ptr(), x.data_ptr(), x.numel())
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        if self.world_size == 1:
            return x
        x, dim = x.contiguous(), dim % x.dim()
        shape = [*x.shape[:dim], self.world_size * x.shape[dim], *x.shape[dim + 1 :]]
        out = x.new_empty(shape)
        if x.numel():
            outer = x.shape[:dim].numel()
            inner = x.nbytes // outer
            self._run(self._kernels.all_gather, x.data_ptr(), out.data_ptr(), outer, inner)
        return out

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            self._kernels.close(group)
        while self._processes:
            os.close(self._processes.pop())

    # -- inside -------------------------------------------------------------------------------

    def _run(self, kernel: Kernel, *arguments: int) -> None:
        if bad := kernel(self._group, *arguments):
            rank, trouble = bad & 0xFFFF, TROUBLE[bad >> 16]
            raise EngineDeadError(f"rank {rank} {trouble} while rank {self.rank} waited for it")


def _kind(x: Tensor) -> int:
    if x.dtype not in KINDS:
        raise TypeError(f"no sum over ranks of {x.dtype}")
    return KINDS[x.dtype]


# ------------------------------------------------------------------------------------------------
# meeting


def _address(placement: Placement) -> str:
    """A name in the abstract namespace, which holds 107 bytes: paths may be longer."""
    return f"\0vllm-di {hashlib.sha256(placement.rendezvous.encode()).hexdigest()}"


Joined = tuple[int, list[int]]
"""File descriptors: of the memory, and of each rank's process."""


@contextlib.contextmanager
def _joined(placement: Placement, size: int, timeout: float) -> Iterator[Joined]:
    """The memory's descriptor is open in the block alone, the others are the caller's.

    Rank 0 makes them and hands them out over a Unix socket in the abstract namespace, which bears
    the rendezvous' name. Each side talks to its own user alone.
    """
    meet = _hand_out if placement.rank == 0 else _receive
    try:
        memory, processes = meet(placement, _address(placement), size, time.monotonic() + timeout)
    except TimeoutError:
        raise EngineDeadError(
            f"communicator=shared_memory: the {placement.world_size} ranks did not meet on this "
            f"host within {timeout:.0f} s"
        ) from None
    except OSError as error:
        raise ConfigError(f"communicator=shared_memory: the ranks cannot meet: {error}") from None
    try:
        yield memory, processes
    finally:
        os.close(memory)


def _hand_out(placement: Placement, address: str, size: int, deadline: float) -> Joined:
    peers: dict[int, socket.socket] = {}
    process_of = {0: os.getpid()}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(address)
        listener.listen(placement.world_size)
        while len(process_of) < placement.world_size:
            _limit(listener, deadline)
            peer = stack.enter_context(listener.accept()[0])
            _limit(peer, deadline)
            process, user, _ = _credentials(peer)
            if user != os.getuid():
                peer.close()
            elif len(word := peer.recv(RANK.size, socket.MSG_WAITALL)) == RANK.size:
                [rank] = RANK.unpack(word)
                peers[rank], process_of[rank] = peer, process
        processes = [os.pidfd_open(process_of[rank]) for rank in range(placement.world_size)]
        memory = os.memfd_create("vllm-di")
        os.ftruncate(memory, size)
        for peer in peers.values():
            socket.send_fds(peer, [b"."], [memory, *processes])
    return memory, processes


def _receive(placement: Placement, address: str, size: int, deadline: float) -> Joined:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        while True:
            _limit(sock, deadline)
            try:
                sock.connect(address)
                break
            except ConnectionRefusedError:  # rank 0 is not there yet
                time.sleep(0.01)
        if _credentials(sock)[1] != os.getuid():
            raise PermissionError("another user listens in rank 0's place")
        sock.sendall(RANK.pack(placement.rank))
        _, files, _, _ = socket.recv_fds(sock, 1, 1 + placement.world_size)
    if not files:
        raise EngineDeadError("rank 0 ended before all ranks had joined")
    return files[0], list(files[1:])


def _limit(sock: socket.socket, deadline: float) -> None:
    """The socket waits until the deadline, and no longer: TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    process, user, group = CREDENTIALS.unpack(raw)
    return process, user, group
