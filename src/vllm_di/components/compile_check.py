"""How a platform's kernels, or its whole step, are compiled for hardware that is not here.

A platform names its compiler in its manifest, under ``platform.compile``; ``vllm-di conform --level
compile`` asks it. Nothing else in the engine does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel, or one step, as a target's compiler made it."""

    name: str
    figures: Mapping[str, int]
    """What it takes, by name: ``registers``, ``spilled``, ``shared_bytes``, ``code_bytes`` ..."""
    bars: Mapping[str, int]
    """The most that a figure may be on this target. A figure without a bar is only reported."""
    advice: str = ""
    """Which key to change when a bar is exceeded."""

    def beyond(self) -> list[str]:
        """A line for each figure that exceeds its bar."""
        return [
            f"{self.name} takes {self.figures[name]:,} {name}, and the bar is {bar:,}"
            for name, bar in self.bars.items()
            if self.figures[name] > bar
        ]


class CompileCheck(ABC):
    """Built with the composed nodes of a worker (slot to node), so that the user's own choices are
    what is compiled. The real device is not opened."""

    @abstractmethod
    def __init__(self, worker: Mapping[str, Any]) -> None:
        """Raises ConfigError where a choice leaves nothing of this compiler's, and PortError where
        its package is absent."""

    @classmethod
    @abstractmethod
    def targets(cls) -> Sequence[str]:
        """What it can compile for; a manifest names some of these."""

    @classmethod
    @abstractmethod
    def parts(cls) -> Sequence[str]:
        """What is compiled, by names that stand in the report."""

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        """Of its compilers, by name; they stand in the report."""
        return {}

    @abstractmethod
    def compile(self, part: str, target: str) -> Sequence[Compiled]:
        """All kernels of one part. Raises PortError where the target's compiler is not there, and
        whatever the compiler itself raises."""
