"""Engines as processes that answer jobs, so that they can take turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import environments as at
from benchmarks.peers.environments import DRIVERS, SetupError

Arguments = Callable[[], list[str]]


class Engine:
    """One driver process, started on first use."""

    def __init__(self, name: str, driver: str, environment: str, arguments: Arguments) -> None:
        self.name, self._driver, self._environment = name, driver, environment
        self._arguments, self._process = arguments, None
        self.failed = ""
        """Why it cannot run."""

    _process: subprocess.Popen[str] | None

    def seconds(self, prompts: list[list[int]], new: int) -> float:
        """How long one job took. Raises SetupError, for good, when the engine cannot do it."""
        if self.failed:
            raise SetupError(self.failed)
        try:
            if self._process is None:
                self._start()
            self._signal(signal.SIGCONT)
            answer = self._ask({"prompts": prompts, "new": new})
            self._signal(signal.SIGSTOP)
            if "error" in answer:
                raise SetupError(answer["error"])
            return float(answer["seconds"])
        except SetupError as error:
            self.failed = str(error)
            raise

    def memory(self) -> int:
        """Proportional set size of the process, bytes."""
        if self._process is None:
            return 0
        text = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        return 1024 * int(next(r for r in text.splitlines() if r.startswith("Pss:")).split()[1])

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._signal(signal.SIGCONT)
            self._process.stdin.close()
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """To the engine and its processes: what does not have its turn stands still, for some wait
        by spinning."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _start(self) -> None:
        command = [str(at.python(self._environment)), str(DRIVERS / self._driver)]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        if self._environment == "vllm":
            runtime = at.HOME / "vllm/lib/libiomp5.so"  # as its manual has it
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
            environment |= {"LD_PRELOAD": str(runtime), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [*command, *self._arguments()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._read()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SetupError(f"{self._driver} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def of(weights: str) -> list[Engine]:
    """Ours first."""

    def ours(option: str) -> Engine:
        return Engine("vllm-di", "ours.py", "ours", lambda: [f"quantization={option}"])

    def llama(file: Callable[[], Path]) -> Engine:
        return Engine("llama.cpp", "llamacpp.py", "llamacpp", lambda: [str(file())])

    def openvino(model: Callable[[], Path]) -> Engine:
        return Engine("OpenVINO", "ov.py", "openvino", lambda: [str(model())])

    if weights == "bf16":
        folder = lambda: [str(at.folder_bf16())]  # noqa: E731
        return [
            ours("none"),
            llama(lambda: at.gguf(at.BF16)),
            openvino(at.openvino_fp16),
            Engine("vLLM", "vllm_cpu.py", "vllm", folder),
            Engine("transformers", "torch_generate.py", "ours", folder),
        ]
    if weights == "int8":
        return [ours("int8"), llama(lambda: at.gguf(at.Q8_0))]
    return [ours("gguf"), llama(at.shipped), openvino(at.shipped)]


@contextlib.contextmanager
def running(weights: str, only: set[str]) -> Iterator[list[Engine]]:
    engines = [e for e in of(weights) if not only or e.name in only or e.name == "vllm-di"]
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()
