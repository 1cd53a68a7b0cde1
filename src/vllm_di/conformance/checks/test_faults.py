"""A worker process that dies or hangs: every open request is told, and a restart is clean."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from vllm_di.components.interfaces import Engine
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import add, ask, run
from vllm_di.conformance.footprint import footprint, settled
from vllm_di.conformance.golden import prompts
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.errors import EngineDeadError

NOTICE_SECONDS = 5.0
STEP_TIMEOUT = 2.0


def workers() -> list[int]:
    """Process ids of worker processes of ours."""
    own, found = os.getpid(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text()
        except (OSError, IndexError):
            continue
        if parent == own and "worker_process" in command:
            found.append(int(entry.name))
    return found


def step_until_dead(engine: Engine) -> float:
    """Seconds until a step says that the engine is dead."""
    begin = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"worker|stage"):
        steps(engine, 30)
    return time.monotonic() - begin


def steps(engine: Engine, seconds: float) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        engine.step()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_worker(subject: Subject, record: Record, how: str) -> None:
    if not Path("/proc").is_dir():
        raise NotDeclared("processes are found in /proc")
    if len(subject.stages) > 1:
        world, more = len(subject.stages), ["executor.processes=true"]
    else:
        world = 2 if 2 in subject.declared.tensor_parallel else 1
        more = ["executor=multiprocess", f"executor.tensor_parallel_size={world}"]
    more.append(f"executor.step_timeout={STEP_TIMEOUT}")
    base = footprint()
    with subject.engine(*more) as engine:
        wanted = run(engine, [ask(prompts(1)[0], 3)])
        add(engine, "open", ask(prompts(1)[0], 200))
        engine.step()
        victims = workers()
        assert len(victims) == world, f"{len(victims)} worker processes, not {world}"
        os.kill(victims[-1], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        seconds = step_until_dead(engine)
    record.figure(seconds=round(seconds, 2), world=world)
    limit = NOTICE_SECONDS if how == "killed" else 1.5 * STEP_TIMEOUT
    assert seconds <= limit, f"noticed after {seconds:.1f} s"
    more_now = settled(base)
    assert not more_now, f"left behind: {'; '.join(more_now)}"
    if how == "killed":
        with subject.engine(*more) as engine:
            again = run(engine, [ask(prompts(1)[0], 3)])
        assert [a.token_ids for a in again] == [a.token_ids for a in wanted], "after a restart"


def test_tensor_parallel_equals_one_rank(subject: Subject, record: Record) -> None:
    if 2 not in subject.declared.tensor_parallel:
        raise NotDeclared("tensor_parallel: 2")
    record.feature("tensor parallel 2")
    asks = [ask(prompt, 8, logprobs=5) for prompt in prompts(4)]
    dtype = f"model.dtype={subject.exact_dtype}"
    with subject.engine(dtype) as engine:
        wanted = run(engine, asks)
    two = ("executor=multiprocess", "executor.tensor_parallel_size=2")
    with subject.engine(dtype, *two) as engine:
        found = run(engine, asks)
    assert_same(found, wanted, subject.slack, "on two ranks")
