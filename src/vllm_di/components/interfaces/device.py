"""For whoever brings a device: where a worker stands, its device, its collectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor


DEFAULT_ROLE = "default"
"""Of the workers of a platform that names no roles."""


@dataclass(frozen=True, slots=True)
class Node:
    """Where a worker is that a cluster has placed."""

    address: str
    """Of its host, as the engine's host sees it: an IP address."""
    num_nodes: int = 1
    """That the ranks of its group are on."""
    slot: int = 0
    """Which of the node's devices, or which part of the node, is this worker's."""
    num_slots: int = 1
    """Parts that the node's cores and memory are cut into."""
    store: int | None = None
    """File descriptor of a connection to the engine's key-value store (``components/meeting.py``),
    by which the ranks of several nodes meet."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Given, not chosen: where this worker stands among its peers."""

    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""
    """For more than one rank ``file://PATH``: a file of torch's FileStore, absent at first, in a
    folder that the user alone can enter. On a cluster a name that nobody can guess: ``node``
    has the way to the others."""
    stage: int = 0
    """Which part of a pipeline this is; ranks are counted within a stage."""
    num_stages: int = 1
    role: str = DEFAULT_ROLE
    """What the worker is for, as the platform's YAML names it: ``prefill``, ``draft``. Ranks and
    stages are counted within a role."""
    replica: int = 0
    """Which of the engines of this host the worker is of; ranks are counted within an engine."""
    num_replicas: int = 1
    node: Node | None = None
    """None: on the engine's own host, with all its peers."""

    @property
    def host_rank(self) -> int:
        """Counted over the ranks of all replicas: which of the host's devices, or which part of
        the host, is this worker's."""
        return self.replica * self.world_size + self.rank if self.node is None else self.node.slot

    @property
    def host_world_size(self) -> int:
        """Workers of the host that share its cores and memory, or take a device each."""
        return self.num_replicas * self.world_size if self.node is None else self.node.num_slots


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. On the host, ``total`` may be a declared budget, and ``free`` what is left of it."""

    free: int
    total: int


class Device(ABC):
    """(1) The device of one rank: memory, dtypes, copies."""

    torch_device: torch.device
    default_dtype: torch.dtype
    supported_dtypes: tuple[torch.dtype, ...]
    """For weights and activations. A dtype outside is an error, never a cast."""
    on_host: ClassVar[bool] = False
    """Whether its tensors lie in memory that other processes of this host could map."""

    @abstractmethod
    def memory(self) -> DeviceMemory | None:
        """Free and total memory now. None: it cannot tell, and the config must size the KV cache
        (``worker.num_blocks`` or ``worker.kv_cache_memory``)."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when all work submitted so far is done."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zeroed tensor on the device; a host may leave its pages to be touched first on use."""
        import torch

        return torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zeroed host tensor to copy to the device from, pinned where that is of use."""
        import torch

        return torch.zeros(tuple(shape), dtype=dtype)

    def mark(self) -> Callable[[], None]:
        """A mark behind all work submitted so far -> a function that returns when that is done."""
        return self.synchronize

    def dtype(self, name: str) -> torch.dtype:
        """``auto`` or a torch dtype's name, checked against ``supported_dtypes``. Raises
        ConfigError."""
        import torch

        from vllm_di.errors import ConfigError, nearest

        names = {str(d).removeprefix("torch."): d for d in self.supported_dtypes}
        if name == "auto":
            return self.default_dtype
        if name not in names:
            known = isinstance(getattr(torch, name, None), torch.dtype)
            why = f"{type(self).__name__} does not support it" if known else "no such dtype"
            raise ConfigError(
                f"dtype {name!r}: {why}; choose auto, {', '.join(names)}{nearest(name, names)}"
            )
        return names[name]

    def close(self) -> None:
        """Release what the device holds."""


class Communicator(ABC):
    """(9) Collectives among the ranks of one tensor-parallel group. All ranks make the same calls
    in the same order."""

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; may work in place. Bit-equal on all ranks afterwards."""

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenate the ranks' equal-shaped tensors along ``dim``, in rank order."""

    def export(self) -> AbstractContextManager[None]:
        """For programs that trace a step and compile it: while the context is open, ``all_reduce``
        and ``all_gather`` leave a mark in the graph (``components/communicator/marks.py``), which
        the program hands to its compiler or replaces by a call. With one rank there is nothing to
        mark. Raises ConfigError where there are several and no marks."""
        if self.world_size == 1:
            return nullcontext()
        from vllm_di.errors import ConfigError

        raise ConfigError(
            f"{type(self).__name__} has no export() for compiled programs; communicator=marked "
            "has one, around any other"
        )

    def close(self) -> None:
        """Leave the group."""
