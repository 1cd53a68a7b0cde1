"""An engine's processes: started, stopped while another has its turn, weighed, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import environments as at


class Processes:
    """A command and all that it starts, as one process group."""

    def __init__(self, command: list[str], environment: str, **streams: Any) -> None:
        self.main: subprocess.Popen[str] = subprocess.Popen(
            command, env=_variables(environment), text=True, start_new_session=True, **streams
        )

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """They run in the block alone: some engines wait by spinning."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def memory(self) -> int:
        """Proportional set size of all of them, bytes."""
        total = 0
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, StopIteration):
                if folder.name.isdigit() and os.getpgid(int(folder.name)) == self.main.pid:
                    rows = (folder / "smaps_rollup").read_text().splitlines()
                    total += 1024 * int(next(r for r in rows if r.startswith("Pss:")).split()[1])
        return total

    def end(self, *, kindly: bool) -> None:
        """Waits for a process that ends by itself; else asks it to. What is left after 20 s, or of
        its children, is killed."""
        self._signal(signal.SIGCONT)
        if not kindly:
            self.main.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.main.wait(20)
        self._signal(signal.SIGKILL)
        self.main.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.main.pid, number)


def _variables(environment: str) -> dict[str, str]:
    """Two threads everywhere; vLLM's as its manual has them."""
    variables = {**os.environ, "OMP_NUM_THREADS": "2"}
    if environment == "vllm":
        preload = [str(at.HOME / "vllm/lib/libiomp5.so"), *at.tcmalloc()]
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": str(at.VLLM_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "LD_PRELOAD": ":".join(preload),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
    return variables
