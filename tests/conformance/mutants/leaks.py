"""Components that leave something behind."""

from __future__ import annotations

import os
import threading
from multiprocessing import shared_memory
from typing import Any

from vllm_di.components.attention.paged import PagedAttention
from vllm_di.components.interfaces import KvLayout, OpTable

KEPT: list[Any] = []
"""What is never given back."""


class ThreadLeak(PagedAttention):
    """Its helper thread waits for ever."""

    def __init__(self, ops: OpTable, kv_layout: KvLayout) -> None:
        super().__init__(ops, kv_layout)
        threading.Thread(target=threading.Event().wait, args=(60,), daemon=True).start()


class FileLeak(PagedAttention):
    def __init__(self, ops: OpTable, kv_layout: KvLayout) -> None:
        super().__init__(ops, kv_layout)
        KEPT.append(os.open(os.devnull, os.O_RDONLY))


class SharedMemoryLeak(PagedAttention):
    def __init__(self, ops: OpTable, kv_layout: KvLayout) -> None:
        super().__init__(ops, kv_layout)
        KEPT.append(shared_memory.SharedMemory(create=True, size=4096))


class MemoryLeak(PagedAttention):
    """A megabyte a start."""

    def __init__(self, ops: OpTable, kv_layout: KvLayout) -> None:
        super().__init__(ops, kv_layout)
        KEPT.append(bytearray(os.urandom(64)) * (2**20 // 64))
