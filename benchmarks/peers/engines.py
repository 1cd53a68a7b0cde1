"""Engines as libraries: processes that answer jobs, so that they can take turns."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import environments as at
from benchmarks.peers.environments import DRIVERS, SetupError
from benchmarks.peers.processes import Processes
from benchmarks.peers.works import LLAMA_1B, Model

Arguments = Callable[[], list[str]]


class Engine:
    """One driver process, started on first use."""

    def __init__(self, name: str, driver: str, environment: str, arguments: Arguments) -> None:
        self.name, self._driver, self._environment = name, driver, environment
        self._arguments = arguments
        self._processes: Processes | None = None
        self.failed = ""
        """Why it cannot run."""

    def times(self, prompts: list[list[int]], new: int, *, keep: bool = False) -> list[list[float]]:
        """Seconds from a job's start to each token, of each prompt; ``keep``: with what the prefix
        cache holds. Raises SetupError, and from then on, when the engine cannot do it; one that
        cannot ``keep`` goes on with other jobs."""
        if self.failed:
            raise SetupError(self.failed)
        try:
            times: list[list[float]] = self._ask({"prompts": prompts, "new": new, "keep": keep})[
                "times"
            ]
            return times
        except SetupError as error:
            if not keep:
                self.failed = str(error)
            raise

    def first_token(self, prompt: list[int]) -> float:
        """Seconds from the command to the answer of one token, by a new process."""
        self.close()
        command = self._command()  # what it needs is set up before the clock starts
        begin = time.perf_counter()
        self._start(command)
        self.times([prompt], 1)
        return time.perf_counter() - begin

    def memory(self) -> int:
        """Bytes in memory beside the KV cache."""
        cache = int(self._ask({"cache": True})["cache"])
        assert self._processes is not None
        return self._processes.memory() - cache

    def close(self) -> None:
        if self._processes is not None:
            assert self._processes.main.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._processes.main.stdin.close()
            self._processes.end(kindly=True)
            self._processes = None

    def _command(self) -> list[str]:
        python = str(at.python(self._environment))
        return [python, str(DRIVERS / self._driver), *self._arguments()]

    def _start(self, command: list[str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._processes = Processes(command, self._environment, **pipes)
        self._read()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._processes is None:
            self._start(self._command())
        assert self._processes is not None
        with self._processes.turn():
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(job), file=self._processes.main.stdin, flush=True)
            answer = self._read()
        if "error" in answer:
            raise SetupError(answer["error"])
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._processes is not None
        assert self._processes.main.stdout is not None
        line = self._processes.main.stdout.readline()
        if not line:
            raise SetupError(f"{self._driver} ended with status {self._processes.main.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def of(weights: str, model: Model) -> list[Engine]:
    """Ours first."""

    def ours(*overrides: str) -> Engine:
        return Engine("vllm-di", "ours.py", "ours", lambda: list(overrides))

    def llama(file: Callable[[], Path]) -> Engine:
        return Engine("llama.cpp", "llamacpp.py", "llamacpp", lambda: [str(file())])

    def openvino(model: Callable[[], Path]) -> Engine:
        return Engine("OpenVINO", "ov.py", "openvino", lambda: [str(model())])

    def vllm(folder: Callable[[], Path], *more: str) -> Engine:
        return Engine("vLLM", "vllm_cpu.py", "vllm", lambda: [str(folder()), *more])

    if model is LLAMA_1B:
        return [
            ours("model=llama3_2_1b", "loader=dummy", "model.max_model_len=2048"),
            llama(at.llama_1b_gguf),
            vllm(at.llama_1b_folder, "random"),
        ]
    if weights == "bf16":
        return [
            ours("quantization=none"),
            llama(lambda: at.gguf(at.BF16)),
            openvino(lambda: at.openvino_folder("fp16")),
            vllm(at.folder_bf16),
            Engine("transformers", "torch_generate.py", "ours", lambda: [str(at.folder_bf16())]),
        ]
    if weights == "int8":
        return [
            ours("quantization=int8"),
            llama(lambda: at.gguf(at.Q8_0)),
            openvino(lambda: at.openvino_folder("int8")),
            vllm(at.folder_w8a8),
        ]
    return [ours("quantization=gguf"), llama(at.shipped), openvino(at.shipped)]


@contextlib.contextmanager
def running(weights: str, model: Model, only: set[str]) -> Iterator[list[Engine]]:
    engines = [e for e in of(weights, model) if not only or e.name in only]
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()
