"""What one run of the suite inside vLLM found: written by ``vllm-di conform --engine vllm``, read
by the support matrix."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata
from typing import Literal

import msgspec

from vllm_di.containers.evidence import source_commit
from vllm_di.report_file import ReportFile
from vllm_di.version import __version__

PACKAGES = ("torch", "transformers", "dependency-injector")


class Outcome(msgspec.Struct, frozen=True):
    """Of one case."""

    name: str
    outcome: Literal["pass", "fail"]
    seconds: float
    why: str = ""
    overrides: list[str] = []
    compiled: bool = False
    """Whether vLLM compiled the model."""
    calls: list[dict[str, int]] = []
    """What each worker's process counted, by rank; empty for a case that must not start."""
    tokens: str = ""
    """How many prompts had the tokens of which reference."""


class Report(ReportFile):
    """Of all cases in one version of vLLM."""

    vllm: str
    platform: str
    started: datetime.datetime
    seconds: float
    device: str
    partial: bool
    """Whether only some cases were run: no evidence for the matrix."""
    versions: dict[str, str]
    cases: list[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        return [case for case in self.cases if case.outcome == "fail"]


def used_versions() -> dict[str, str]:
    """Of this project, its packages here, Python, the system and the source tree."""
    found = {"vllm-di": __version__, "python": platform.python_version()}
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found |= {name: metadata.version(name) for name in PACKAGES}
    if commit := source_commit():
        found["commit"] = commit
    return found
