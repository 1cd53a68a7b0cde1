"""The render process: Jinja2 in the same sandbox as in transformers, with limits on CPU time and
memory that the operating system enforces.

``python -m vllm_di.components.chat_template.child`` reads frames from standard input, answers on
standard output, and exits at the end of its input. It imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from vllm_di.components.chat_template.filters import tojson
from vllm_di.components.chat_template.frames import LENGTH, Answer, Job, Setup, frame


class Renderer:
    """The compiled templates. ``main`` limits time and memory. Raises TemplateError for a source
    that does not compile."""

    def __init__(self, setup: Setup) -> None:
        self._now = 0.0
        self._max_chars = setup.max_chars
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": self._strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._templates = {n: environment.from_string(s) for n, s in setup.sources.items()}

    def render(self, job: Job) -> Answer:
        """Render one prompt. Every exception becomes an answer."""
        self._now = job.now
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._templates[job.name].generate(job.values):
                num_chars += len(part)
                if num_chars > self._max_chars:
                    return Answer(error=f"the prompt is longer than {self._max_chars} characters")
                parts.append(part)
            text = "".join(parts)
            text.encode()  # a lone surrogate cannot be framed
        except Refusal as error:
            return Answer(refusal=str(error.message))
        except MemoryError:
            return Answer(error="the template exceeds its memory limit")
        except Exception as error:
            return Answer(error=_first_line(error))
        return Answer(text=text)

    def _strftime_now(self, format: str) -> str:
        return datetime.fromtimestamp(self._now).strftime(format)


class Refusal(TemplateError):
    """A template called ``raise_exception``."""


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it has no effect. As in
    transformers, its body is a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` as a function, so that templates reach no attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """As in transformers, names that begin with an underscore are refused."""

    # No named parameter: a template may call namespace(self=1).
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *pairs = args
        attributes = dict(*pairs, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute must not begin with an underscore: {name!r}")


def _refuse(message: str) -> NoReturn:
    raise Refusal(str(message))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    line = getattr(error, "lineno", None)
    place = f"line {line}: " if line else ""
    return f"{place}{type(error).__name__}: {lines[0][:300]}"


def main(source: BinaryIO, sink: BinaryIO) -> None:
    """Compile the templates of the Setup, then answer Jobs until the input ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # on Ctrl-C the server drains, and needs this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    body = _read(source)
    if body is None:
        return
    setup = msgspec.msgpack.decode(body, type=Setup)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
    renderer: Renderer | None = None
    _limit_time(setup.cpu_seconds)
    try:
        renderer = Renderer(setup)
        reply = frame(Answer())
    except MemoryError:
        reply = frame(Answer(error="compiling the template exceeds its memory limit"))
    except Exception as error:
        reply = frame(Answer(error=_first_line(error)))
    while True:
        _limit_time(0)
        sink.write(reply)
        sink.flush()
        body = _read(source)
        if body is None or renderer is None:
            return
        _limit_time(setup.cpu_seconds)
        reply = _reply(renderer, body)


def _reply(renderer: Renderer, body: bytes) -> bytes:
    try:
        return frame(renderer.render(msgspec.msgpack.decode(body, type=Job)))
    except MemoryError:
        return frame(Answer(error="these messages exceed the memory limit of the template"))


def _limit_time(cpu_seconds: float) -> None:
    """Let the operating system end the process (SIGPROF) after that much CPU time; 0 removes the
    limit."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


if __name__ == "__main__":
    try:
        main(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # the server is gone
        os._exit(0)  # skip the flush at exit, which would fail
