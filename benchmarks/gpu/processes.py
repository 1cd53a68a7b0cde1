"""Jobs: processes with a time limit, of which one that crashes or hangs takes no other with it.

A job writes rows of JSON to the file that its ``--out`` names, so that one that is cut off leaves
what it found. ``{"begin": N}`` says that item N is under way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
GRACE = 8.0
"""Seconds between being asked to end and being killed."""
MOST_STARTS = 12
TAIL = 6000
"""Characters of a failed job's output that go into the JSON."""
POISONED = 75
"""Exit status of a job whose device context is spent: it is started again behind that item."""


@dataclass(frozen=True)
class Job:
    """One process."""

    name: str
    command: Sequence[str]
    resumes: bool = False
    """Whether it takes ``--start N``: after a crash it goes on behind the item that it was at."""
    rows: bool = True
    """Whether it takes ``--out FILE``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    """A limit below that of its part."""


@dataclass
class Outcome:
    """What became of a job."""

    name: str
    status: str = "not run"
    """``passed``, ``failed``, ``cut off``, ``not run``."""
    code: int | None = None
    seconds: float = 0.0
    starts: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    tail: str = ""
    """The end of what a job that did not pass printed."""


class Running:
    """A job under way."""

    def __init__(self, job: Job, folder: Path, limit: float) -> None:
        self.job, self._folder = job, folder
        self._begin = time.monotonic()
        self._deadline = self._begin + min(limit, job.seconds or limit)
        self._asked: float | None = None
        self._starts = 0
        self._out = folder / f"{job.name}.jsonl"
        self._log = folder / f"{job.name}.log"
        self._out.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
        self._start()

    def poll(self) -> Outcome | None:
        """None while it runs. Asks it to end at its limit, and kills it when it does not."""
        code, now = self._process.poll(), time.monotonic()
        if code is None:
            if self._asked is None and now > self._deadline:
                self._asked = now
                self._signal(signal.SIGINT)
            elif self._asked is not None and now > self._asked + GRACE:
                self._signal(signal.SIGKILL)
            return None
        self._signal(signal.SIGKILL)  # what it left running
        if self._asked is None and self._may_resume(code):
            self._start()
            return None
        return self._outcome(code)

    def _start(self) -> None:
        command = [*self.job.command]
        if self.job.rows:
            command += ["--out", str(self._out)]
        if self._starts:
            command += ["--start", str(1 + self._last_begun())]
        self._starts += 1
        stream: IO[str]
        with self._log.open("a") as stream:
            print("$", *command, file=stream, flush=True)
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.job.environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _may_resume(self, code: int) -> bool:
        """A crash inside an item is that item's failure."""
        if not self.job.resumes or not code or self._starts >= MOST_STARTS:
            return False
        rows = read_rows(self._out)
        if rows and "begin" in rows[-1]:
            how = f"the process ended with status {code}" if code > 0 else f"killed by {-code}"
            failed = {"name": rows[-1].get("name"), "passed": False, "error": how}
            failed["trace"] = tail(self._log)
            with self._out.open("a") as stream:
                print(json.dumps(failed), file=stream)
            return True
        return code == POISONED

    def _last_begun(self) -> int:
        begun = [row["begin"] for row in read_rows(self._out) if "begin" in row]
        return begun[-1] if begun else -1

    def _outcome(self, code: int) -> Outcome:
        rows = [row for row in read_rows(self._out) if "begin" not in row]
        wrong = any(row.get("passed") is False for row in rows)
        status = "passed" if not code and not wrong else "failed"
        return Outcome(
            name=self.job.name,
            status="cut off" if self._asked is not None else status,
            code=code,
            seconds=round(time.monotonic() - self._begin, 1),
            starts=self._starts,
            rows=rows,
            tail="" if status == "passed" else tail(self._log),
        )


def run(
    jobs: Sequence[Job],
    folder: Path,
    limit: float,
    workers: int,
    ended: Callable[[Outcome], None] = lambda _outcome: None,
) -> list[Outcome]:
    """All of them, ``workers`` at a time, within ``limit`` seconds and GRACE. ``ended`` is told
    of each."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + limit
    outcomes = {job.name: Outcome(job.name) for job in jobs}
    waiting, running = list(jobs), list[Running]()
    while waiting or running:
        while waiting and len(running) < workers and time.monotonic() < deadline:
            running.append(Running(waiting.pop(0), folder, deadline - time.monotonic()))
        if waiting and not running:
            break  # no time is left for these
        for one in [*running]:
            if (outcome := one.poll()) is not None:
                running.remove(one)
                outcomes[outcome.name] = outcome
                ended(outcome)
        time.sleep(0.05)
    return list(outcomes.values())


def read_rows(path: Path) -> list[dict[str, Any]]:
    return list(_rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a killed process
            yield json.loads(line)


def tail(path: Path) -> str:
    return path.read_text(errors="replace")[-TAIL:] if path.exists() else ""


class Rows:
    """The writing side: a file of rows, each there as soon as it is known."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __call__(self, **row: Any) -> None:
        text = json.dumps(row, default=str)
        if self._path is None:
            print(text, flush=True)
            return
        with self._path.open("a") as stream:
            print(text, file=stream)
