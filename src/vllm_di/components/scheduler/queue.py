"""The waiting sequences, in the order in which they are to run."""

from __future__ import annotations

import heapq
from collections import deque
from typing import Literal

from vllm_di.components.scheduler.sequence import Sequence


class WaitingQueue:
    """First come first served, or by priority. A preempted sequence goes back to the front of its
    kind."""

    def __init__(self, policy: Literal["fcfs", "priority"]) -> None:
        self._by_priority = policy == "priority"
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._fifo: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._heap) + len(self._fifo)

    def __bool__(self) -> bool:
        return len(self) > 0

    def push(self, sequence: Sequence) -> None:
        """A new arrival."""
        if self._by_priority:
            heapq.heappush(self._heap, (sequence.rank, sequence))
        else:
            self._fifo.append(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """A preempted sequence: it arrived before all that still wait."""
        if self._by_priority:
            heapq.heappush(self._heap, (sequence.rank, sequence))
        else:
            self._fifo.appendleft(sequence)

    def first(self) -> Sequence:
        return self._heap[0][1] if self._by_priority else self._fifo[0]

    def pop(self) -> Sequence:
        return heapq.heappop(self._heap)[1] if self._by_priority else self._fifo.popleft()

    def remove(self, sequence: Sequence) -> None:
        if self._by_priority:
            self._heap.remove((sequence.rank, sequence))
            heapq.heapify(self._heap)
        else:
            self._fifo.remove(sequence)
