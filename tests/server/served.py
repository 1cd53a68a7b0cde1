"""A whole server, as the command line starts it, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest


@contextmanager
def served(overrides: Sequence[str]) -> Iterator[str]:
    """Its address, once it is ready."""
    with started(["serve", *overrides]) as (address, _):
        yield address


@contextmanager
def started(
    words: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """By the words after ``vllm-di``, but on a free port: its address, once it is ready."""
    command = [sys.executable, "-m", "vllm_di.cli", *words, "server.port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"listening on (http://\S+)", line):
                    address = found[1]
                if line.startswith("INFO ready"):
                    break
            else:
                pytest.fail("".join(said))
            yield address, process
        finally:
            process.terminate()
            process.communicate()
