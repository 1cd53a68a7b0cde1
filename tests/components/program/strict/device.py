"""A device whose memory is counted by hand."""

from __future__ import annotations

from vllm_di.components.device.host import HostDevice
from vllm_di.components.device.sizes import parse_size
from vllm_di.components.interfaces import DeviceMemory
from vllm_di.errors import ConfigError


class StrictDevice(HostDevice):
    """Runs on the host; programs and the cache take from ``memory``."""

    on_host = False

    def __init__(self, *, memory: str) -> None:
        super().__init__(threads=1, memory_budget=None, default_dtype="float32")
        self._total = self._free = parse_size(memory, "memory")

    def take(self, num_bytes: int, what: str) -> None:
        """Raises ConfigError where so much is not left."""
        if num_bytes > self._free:
            raise ConfigError(f"{what}: {num_bytes} bytes do not fit {self._free}")
        self._free -= num_bytes

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self._free, self._total)
