"""``vllm-di conform --engine vllm``: the adapters inside vLLM, each beside stock vLLM.

vLLM is imported once; each case is a forked child with an engine of its own, so that nothing of one
is left for the next. Stock vLLM runs in a fresh process, without this project's plugin.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_di.components.device.system import cpu_name
from vllm_di.errors import ConfigError, nearest
from vllm_di.vllm import versions
from vllm_di.vllm.conformance.cases import CASES, REFERENCES, Case
from vllm_di.vllm.conformance.engine import NUM_PROMPTS, answer, write_model
from vllm_di.vllm.conformance.report import Outcome, Report, used_versions

LIMIT = 900
"""Seconds for one case."""


def run(platform: str | None = None, only: Sequence[str] = ()) -> Report:
    """Run the cases whose names are in ``only``, or all. Raises ConfigError without vLLM, outside
    of its tested range, or for a name that is none."""
    versions.check()
    names = [case.name for case in CASES]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: no case {name!r}{nearest(name, names)}")
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), platform)
        cases = [suite.judge(case) for case in CASES if not only or case.name in only]
    seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    built_for, _ = versions.build() or ("auto", "")
    return Report(
        vllm=versions.installed() or "",
        platform=platform.partition("=")[2] if platform else built_for,
        started=started,
        seconds=round(seconds, 1),
        device=cpu_name(),
        partial=bool(only),
        versions=used_versions(),
        cases=cases,
    )


class Suite:
    """Runs cases in a folder. References are run when a case first asks for one."""

    def __init__(self, folder: Path, platform: str | None = None) -> None:
        self._folder, self._platform = folder, platform
        self._references: dict[str, dict[str, Any]] = {}
        self._model = write_model(folder / "model")

    def judge(self, case: Case) -> Outcome:
        """Run a case and hold it against its reference."""
        start = time.perf_counter()
        found = self._run(case)
        why = self._why(case, found)
        equal = f"{NUM_PROMPTS} of {NUM_PROMPTS} prompts as {case.reference}"
        return Outcome(
            name=case.name,
            outcome="fail" if why else "pass",
            seconds=round(time.perf_counter() - start, 1),
            why=why,
            overrides=list(case.overrides),
            compiled=not case.arguments.get("enforce_eager", True),
            calls=[report["calls"] for report in found.get("reports", [])],
            tokens=equal if case.reference and not case.refused and not why else "",
        )

    def _why(self, case: Case, found: dict[str, Any]) -> str:
        """Why a case failed; empty where it passed."""
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
