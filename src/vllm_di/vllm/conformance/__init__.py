"""``vllm-di conform --engine vllm``: the adapters inside vLLM, each beside stock vLLM.

vLLM is imported once; each case is a forked child with an engine of its own, so that nothing of one
is left for the next. Stock vLLM runs in a fresh process, without this project's plugin.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from vllm_di.errors import ConfigError, nearest
from vllm_di.vllm import versions
from vllm_di.vllm.conformance.cases import CASES, REFERENCES, Case
from vllm_di.vllm.conformance.engine import answer, write_model

LIMIT = 300
"""Seconds for one case."""


class Outcome(msgspec.Struct, frozen=True):
    """Of one case."""

    name: str
    outcome: Literal["pass", "fail"]
    seconds: float
    why: str = ""


class Report(msgspec.Struct):
    """Of all cases in one version of vLLM."""

    vllm: str
    platform: str
    cases: list[Outcome]


def run(platform: str | None = None, only: Sequence[str] = ()) -> Report:
    """Run the cases whose names are in ``only``, or all. Raises ConfigError without vLLM, outside
    of its tested range, or for a name that is none."""
    versions.check()
    names = [case.name for case in CASES]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: no case {name!r}{nearest(name, names)}")
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), platform)
        cases = [suite.judge(case) for case in CASES if not only or case.name in only]
    name = (platform or "platform=auto").partition("=")[2]
    return Report(versions.installed() or "", name, cases)


class Suite:
    """Runs cases in a folder. References are run when a case first asks for one."""

    def __init__(self, folder: Path, platform: str | None = None) -> None:
        self._folder, self._platform = folder, platform
        self._references: dict[str, dict[str, Any]] = {}
        self._model = write_model(folder / "model")

    def judge(self, case: Case) -> Outcome:
        """Run a case and hold it against its reference."""
        start = time.perf_counter()
        why = self._why(case)
        seconds = round(time.perf_counter() - start, 1)
        return Outcome(case.name, "fail" if why else "pass", seconds, why)

    def _why(self, case: Case) -> str:
        """Why a case failed; empty where it passed."""
        found = self._run(case)
        if case.refused:
            error = found.get("error", "it started")
            missing = [part for part in case.refused if part not in error]
            return f"expected {missing[0]!r} in: {error}" if missing else ""
        if "error" in found:
            return str(found["error"])
        for rank, report in enumerate(found["reports"]):
            for name in case.calls:
                if not report["calls"].get(name):
                    return f"rank {rank}: {name} was never called: {report['calls']}"
            for slot, end in case.held.items():
                held = report["held"][slot]
                if not all(name.endswith(end) for name in held) or not held:
                    return f"rank {rank}: {slot} holds {held}, expected {end}"
        for metric in case.metrics:
            if not found["metrics"].get(metric):
                return f"{metric} is 0: the case did not do what it is for"
        if not case.reference:
            return ""
        reference = self._reference(case.reference)
        if "error" in reference:
            return f"{case.reference}: {reference['error']}"
        if case.name == "nothing-set" and found["reports"] != reference["reports"]:
            return f"holds {found['reports']}, stock vLLM {reference['reports']}"
        equal = sum(a == b for a, b in zip(found["tokens"], reference["tokens"], strict=True))
        total = len(reference["tokens"])
        return "" if equal == total else f"{equal} of {total} prompts have stock vLLM's tokens"

    def _reference(self, name: str) -> dict[str, Any]:
        if name not in self._references:
            case = next(case for case in REFERENCES if case.name == name)
            self._references[name] = self._run(case)
        return self._references[name]

    def _run(self, case: Case) -> dict[str, Any]:
        """A case's answer, or ``{"error": ...}``."""
        is_fresh = "VLLM_PLUGINS" in case.environment
        if not is_fresh:
            import vllm.v1.engine.llm_engine  # noqa: F401 - once, for every child

        result = self._folder / "answer.json"
        result.unlink(missing_ok=True)
        log = self._folder / "log"
        context: Any = multiprocessing.get_context("spawn" if is_fresh else "fork")
        overrides = [*([self._platform] if self._platform and case.overrides else [])]
        arguments = (str(self._model), [*overrides, *case.overrides], dict(case.arguments))
        before = dict(os.environ)
        os.environ.update(case.environment)
        try:
            child = context.Process(target=answer, args=(*arguments, str(result), str(log)))
            child.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        child.join(LIMIT)
        if child.is_alive():
            child.kill()
            return {"error": f"no answer within {LIMIT} s; its log ends with {_tail(log)}"}
        if not result.is_file():
            return {"error": f"exit status {child.exitcode}; its log ends with {_tail(log)}"}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    return text[-600:]


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(run(only=sys.argv[1:]))))
