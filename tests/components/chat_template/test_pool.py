"""The processes that render: their bounds, their ends, and that one never holds up another."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import psutil
import pytest

from vllm_di.components.chat_template.child import Renderer
from vllm_di.components.chat_template.frames import Job, Setup
from vllm_di.components.chat_template.pool import RenderPool
from vllm_di.components.chat_template.prompt import RenderedTemplate
from vllm_di.components.chat_template.sources import Sources
from vllm_di.errors import ConfigError, RequestError

SOURCE = """{%- if bomb == 'time' %}
  {%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif bomb == 'memory' %}{% set long = text * 100000000 %}{{ long ~ long ~ long }}
{%- elif bomb == 'length' %}{% for a in range(9999) %}{{ 'x' * 999 }}{% endfor %}
{%- elif bomb == 'one piece' %}{{ 'x' * 2000000 }}
{%- elif bomb == 'depth' %}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{%- elif bomb == 'surrogate' %}{{ '\\ud800' }}
{%- else %}{{ text }}{% endif %}"""
SETUP = Setup({"default": SOURCE}, cpu_seconds=0.5, memory_bytes=300 * 2**20, max_chars=1_000_000)


def job(text: str = "", **values: Any) -> Job:
    return Job("default", {"text": text, **values}, time.time())


@pytest.fixture
def pool() -> Iterator[RenderPool]:
    with closing(RenderPool(SETUP, 2)) as made:
        yield made


def children() -> list[psutil.Process]:
    """The processes that render for this one."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if "vllm_di.components.chat_template.child" in process.cmdline():
                found.append(process)
    return found


BOMBS = [
    ("time", r"takes more than 0\.5 s of CPU time"),
    ("memory", "memory"),
    ("length", "longer than 1000000 characters"),
    ("one piece", "longer than 1000000 characters"),
    ("depth", "RecursionError"),
    ("surrogate", "surrogates"),
]


@pytest.mark.parametrize(("bomb", "message"), BOMBS)
def test_a_bomb_ends_its_own_request_alone(pool: RenderPool, bomb: str, message: str) -> None:
    for _ in range(3):
        with pytest.raises(RequestError, match=message) as error:
            pool.render(job("x", bomb=bomb))
        assert (error.value.status, error.value.param) == (400, "messages")
        assert pool.render(job("fine")) == "fine"
    assert len(children()) == 2


def test_a_slow_render_delays_no_other() -> None:
    """The slow one stops for good; others end while it is still on its way."""
    errors: list[RequestError] = []
    with closing(RenderPool(SETUP, 2)) as pool:
        (first,) = [p for p in children() if p.pid == _pid_of_next(pool)]

        def slow() -> None:
            try:
                pool.render(job("late"))
            except RequestError as error:
                errors.append(error)

        first.suspend()
        thread = threading.Thread(target=slow)
        thread.start()
        while pool._idle.qsize() == 2:
            time.sleep(0.001)
        for i in range(20):
            assert pool.render(job(f"n{i}")) == f"n{i}"
        assert thread.is_alive()
        pool.close()
        thread.join()
    assert [error.status for error in errors] == [503]
    assert not children()


def _pid_of_next(pool: RenderPool) -> int:
    process = pool._idle.queue[-1]._process
    assert process is not None
    return process.pid


def test_a_process_killed_from_outside_is_replaced_unseen(pool: RenderPool) -> None:
    for _ in range(3):
        for process in children():
            process.kill()
        assert pool.render(job("again")) == "again"
    os.kill(_pid_of_next(pool), signal.SIGSTOP)  # so that its time does not run out before
    busy = threading.Thread(target=lambda: _kill_what_runs(pool))
    busy.start()
    with pytest.raises(RequestError, match="takes more than"):
        pool.render(job(bomb="time"))  # killed once, asked again, out of time the second time
    busy.join()
    assert pool.render(job("after")) == "after"


def _kill_what_runs(pool: RenderPool) -> None:
    while pool._idle.qsize() == 2:
        time.sleep(0.001)
    (running,) = [w for w in pool._workers if w not in pool._idle.queue]
    running.kill()


def test_a_stopped_process_is_given_up(pool: RenderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_di.components.chat_template import pool as module

    start = module._Worker.start

    def patient(worker: module._Worker) -> None:
        monkeypatch.setattr(module, "_SILENCE_SECONDS", 60.0)  # a busy machine starts no faster
        start(worker)

    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(module._Worker, "start", patient)
    stopped = _pid_of_next(pool)
    os.kill(stopped, signal.SIGSTOP)
    assert pool.render(job("x")) == "x"
    assert not psutil.pid_exists(stopped)


def test_long_texts_pass_whole(pool: RenderPool) -> None:
    text = "é🙂" * 400_000
    assert pool.render(job(text)) == text


@pytest.mark.parametrize("value", [2**70, object(), "\ud800"])
def test_values_that_no_frame_holds(pool: RenderPool, value: object) -> None:
    with pytest.raises(RequestError, match="cannot be passed"):
        pool.render(job(value=value))
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="cannot be passed"):
        pool.render(job(value=deep))
    while deep:
        deep = deep[0]


def test_what_does_not_compile_is_an_error_at_the_start() -> None:
    for source in ("{% if %}", "{{ x | no_such_filter }}", "{% for %}", "{{ " + "(" * 5000):
        with pytest.raises(ConfigError, match=r"Error: \w"):
            RenderPool(Setup({"default": source}, 0.5, 2**28, 1000), 2)
    assert not children()


def test_nothing_is_left_after_a_close() -> None:
    files = len(os.listdir("/proc/self/fd"))
    pool = RenderPool(SETUP, 3)
    assert len(children()) == 3
    pool.close()
    pool.close()
    assert not children()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files
    with pytest.raises(RequestError, match="stopping"):
        pool.render(job("x"))


def test_the_processes_end_with_the_server() -> None:
    code = (
        "import os, signal\n"
        "from vllm_di.components.chat_template.frames import Setup\n"
        "from vllm_di.components.chat_template.pool import RenderPool\n"
        "pool = RenderPool(Setup({'default': 'x'}, 1.0, 2**29, 99), 2)\n"
        "print(*[w._process.pid for w in pool._workers], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    pids = [int(word) for word in out.split()]
    assert len(pids) == 2
    while any(psutil.pid_exists(p) for p in pids):  # ended by pytest's timeout
        time.sleep(0.01)


def test_the_child_is_light() -> None:
    code = (
        "import sys, vllm_di.components.chat_template.child\n"
        "bad = {'torch', 'transformers', 'numpy', 'starlette'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


LONG: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "one message": lambda n: [{"role": "user", "content": "word " * n}],
    "many messages": lambda n: [{"role": "user", "content": "w"}] * (n // 8),
    "parts": lambda n: [{"role": "user", "content": [{"type": "text", "text": "w"}] * (n // 8)}],
}
READ = """{% for m in messages %}{% if m.content is string %}{{ m.role }}: {{ m.content | trim }}
{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("shape", LONG)
def test_time_grows_no_faster_than_the_input(shape: str) -> None:
    """CPU time, in this thread, of all that the API process and the child do."""
    renderer = Renderer(Setup({"default": READ}, 1.0, 2**30, 2**24))

    class InThisProcess(RenderedTemplate):
        def _run(self, name: str, values: Mapping[str, Any]) -> str:
            return renderer.render(Job(name, dict(values), 0.0)).text

    template = InThisProcess(Sources({"default": READ}, "here", {}), require_text=True)

    few, many = LONG[shape](100_000), LONG[shape](400_000)

    def cost(messages: list[dict[str, Any]]) -> float:
        start = time.thread_time()
        template.render(messages)
        return time.thread_time() - start

    least_of_few, least_of_many = math.inf, math.inf
    for _ in range(30):  # what else runs makes single ones slower
        least_of_few = min(least_of_few, cost(few))
        least_of_many = min(least_of_many, cost(many))
        if least_of_many <= 6 * least_of_few:
            break
    assert least_of_many <= 10 * least_of_few  # four times is linear, sixteen quadratic
