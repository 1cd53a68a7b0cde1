"""Real clients, each pinned in an environment of its own: ``make test-clients``."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.clients.environment import CLIENTS, interpreter
from tests.server.served import served

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1200)]
CASES = Path(__file__).parent / "cases"
SMALL = ["model=tiny", "platform=cpu", "model.dtype=float32", "model.max_model_len=256"]


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The demo model, whose answers are text."""
    with served(["platform=cpu", "tool_parser=hermes"]) as url:
        yield url


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """A model with few tokens of context, so that no request takes long."""
    settings = ["tool_parser=hermes", "reasoning_parser=qwen3"]
    with served([*SMALL, *settings]) as url:
        yield url


@pytest.fixture(scope="module")
def pooled() -> Iterator[str]:
    """A model that makes embeddings."""
    with served([*SMALL, "pooler=mean"]) as url:
        yield url


def run(name: str, url: str, case: str = "case") -> None:
    done = subprocess.run(
        [interpreter(name), "run.py", f"{name}_{case}", url],
        cwd=CASES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert ": good" in done.stdout


@pytest.mark.parametrize("name", [name for name in CLIENTS if name != "schemathesis"])
def test_client(name: str, demo: str) -> None:
    run(name, demo)


@pytest.mark.parametrize("name", ["openai", "langchain", "litellm"])
def test_embeddings(name: str, pooled: str) -> None:
    run(name, pooled, "pooled")


def test_openapi_is_true(tiny: str) -> None:
    run("schemathesis", tiny)
