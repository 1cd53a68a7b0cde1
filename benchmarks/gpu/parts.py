"""The parts of a run, in order, each with jobs side by side and a limit of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.processes import Job

PYTHON = sys.executable
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Tests run with the plugins that they name, whatever the machine has."""
ON_DEVICE = "tests/kernels/triton/interpreted.py"
"""The interpreter's tests; without TRITON_INTERPRET they run on the device."""
SHARDS = {
    "mixed": "attention_of_mixed",
    "windows": "windows_and_soft",
    "sizes": "attention and not (of_mixed or windows_and_soft)",
    "rows": "not attention and not sampling and not greedy and not model",
    "tokens": "sampling or greedy or model",
}
CHECKS = {
    "ops": "ops",
    "attention": "prefill decode chunks kv",
    "sampling": "sampler communicator",
    "models": "weights golden logprobs",
    "engine": "batching graphs cache",
    "service": "lifecycle faults api soak",
    "declared": "manifest imports absence config graph",
}
"""Checks of the conformance suite that run side by side, before the whole suite in one: what a
crash in the whole would hide is told by these, and kernels are compiled by then. Without those of
memory, which would see each other's."""
WARMERS = 4


@dataclass(frozen=True)
class Part:
    """Jobs that may run side by side."""

    name: str
    jobs: tuple[Job, ...]
    limit: float
    """Seconds that it may take."""
    keep: float = 0.0
    """Seconds of the budget that it may not touch: the later parts need them."""
    parallel: bool = True
    needed: bool = False
    """Whether nothing else is worth its time when a job of it ends with another status than 0."""


def parts(families: tuple[str, ...], folder: Path, plan: Path | None) -> tuple[Part, ...]:
    """Of a machine with a GPU. ``folder`` takes reports; ``plan`` is the one of ``shapes``."""
    return (
        Part("machine", (module("machine"),), limit=90, keep=300, needed=True),
        Part("correct", (*kernels(families), *tests(), *shards(folder)), limit=180, keep=250),
        Part("conformance", (conform("conformance", folder),), limit=240, keep=130),
        Part("rates", (module("rates"),), limit=60, keep=70, parallel=False),
        Part("shapes", (shapes(plan),), limit=200, parallel=False),
    )


def module(name: str, *words: str, job: str = "", resumes: bool = False) -> Job:
    command = (PYTHON, "-m", f"benchmarks.gpu.{name}", *words)
    return Job(job or name, command, resumes=resumes)


def kernels(families: tuple[str, ...]) -> list[Job]:
    """The longest first."""
    ordered = sorted(families, key=lambda name: not name.startswith("attention"))
    return [module("kernels", name, job=f"kernel-{name}", resumes=True) for name in ordered]


def tests() -> list[Job]:
    pytest: tuple[str, ...] = (
        PYTHON,
        "-m",
        "pytest",
        "-p",
        "pytest_timeout",
        "-p",
        "no:cacheprovider",
    )
    pytest += ("-W", "default", "--tb=long", "-rfE", "-v", "-m", "not slow", "--timeout=120")
    jobs = [
        Job(f"tests-{name}", (*pytest, ON_DEVICE, "-k", words), rows=False, environment=NO_PLUGINS)
        for name, words in SHARDS.items()
    ]
    command: tuple[str, ...] = (*pytest, "tests/ports/cuda_device.py", "tests/ports/test_cuda.py")
    port = Job("tests-port", command, rows=False, environment=NO_PLUGINS)
    return [*jobs, port, module("answers")]


def shards(folder: Path) -> list[Job]:
    """Checks side by side; and each kernel rate once untimed, so that it is compiled."""
    checks = [conform(f"conform-{name}", folder, only) for name, only in CHECKS.items()]
    words = ("--warm", "--share")
    warm = [module("rates", *words, f"{n}/{WARMERS}", job=f"compile-{n}") for n in range(WARMERS)]
    return [*checks, *warm]


def conform(name: str, folder: Path, only: str = "") -> Job:
    command: tuple[str, ...] = (PYTHON, "-m", "vllm_di.cli", "conform", "platform=cuda")
    command += ("--json", str(folder / f"{name}.json"))
    return Job(name, (*command, *(("--only", only) if only else ())), rows=False)


def shapes(plan: Path | None) -> Job:
    return module("shapes", *(("--plan", str(plan)) if plan else ()))
