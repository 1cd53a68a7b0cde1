"""Inside the real vLLM, for each version that is tested: ``make test-vllm``. Each runs in its own
environment; here its answers are read."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.vllm import record
from tests.vllm.environment import VERSIONS, interpreter, variables
from tests.vllm.model import smollm2

from vllm_di.vllm import versions
from vllm_di.vllm.conformance.cases import CASES

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400)]


@functools.cache
def report(version: str) -> dict[str, dict[str, Any]]:
    """Case to outcome: the whole suite, once a version."""
    file = interpreter(version).parents[1] / "report.json"
    file.unlink(missing_ok=True)
    done = _python(version, "-m", "vllm_di.cli", "conform", "--engine", "vllm", "--json", str(file))
    assert file.is_file(), done.stderr[-2000:]
    return {case["name"]: case for case in json.loads(file.read_bytes())["cases"]}


@pytest.mark.parametrize("case", [case.name for case in CASES])
@pytest.mark.parametrize("version", VERSIONS)
def test_conformance(version: str, case: str) -> None:
    found = report(version)[case]
    assert found["outcome"] == "pass", found["why"]


def test_the_versions_are_those_that_the_package_names() -> None:
    assert sorted(VERSIONS) == sorted(versions.TESTED)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_recorded_signatures_are_those_of_the_package(version: str, tmp_path: Path) -> None:
    recorded, found = record.RECORDS / f"{version}.json", tmp_path / "found.json"
    done = _python(version, "-m", "tests.vllm.record", str(found))
    assert found.is_file(), done.stderr[-2000:]
    assert json.loads(found.read_bytes()) == json.loads(recorded.read_bytes())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_launcher_answers_over_http(version: str, tmp_path: Path) -> None:
    """The API process, the engine's and the worker's: three processes."""
    choices = ["attention=sdpa", "ops.rms_norm=torch"]
    line = ["-m", "vllm_di.cli", "vllm", "serve", str(smollm2()), *choices, "--"]
    with served(version, line, ["--enforce-eager", "--dtype", "float32"], tmp_path / "log") as url:
        assert "Paris" in ask(url)
        calls = report_of(url)["calls"]
    assert calls["attention.forward"] >= 30
    assert calls["rms_norm"] >= 1
    assert "silu_and_mul" not in calls


@pytest.mark.parametrize("version", VERSIONS)
def test_environment_and_flag_add_up_over_http(version: str, tmp_path: Path) -> None:
    """``vllm serve`` itself, as it compiles by default, with a worker of a user's."""
    worker = "vllm_di.vllm.conformance.samples.CountedWorker"
    chosen = {"DI_CONFIG": f"attention=paged worker._target_={worker}"}
    flag = json.dumps({"vllm_di": ["ops=cpu", "quantization=none"]})
    line = ["-m", "vllm.entrypoints.cli.main", "serve", str(smollm2())]
    flags = ["--additional-config", flag]
    with served(version, line, flags, tmp_path / "log", chosen) as url:
        assert "Paris" in ask(url)
        found = report_of(url)
    assert found["held"]["worker"] == [worker]
    for name in ("attention.forward", "add_rms_norm", "silu_and_mul", "rotary_embedding"):
        assert found["calls"][name] >= 30, name  # layers
    assert found["calls"]["linear"] >= 120
    for name in ("rms_norm", "head"):
        assert found["calls"][name] >= 1, name


@pytest.mark.parametrize("version", VERSIONS[:1])
def test_a_wrong_name_ends_python_before_vllm_is_imported(version: str) -> None:
    code = (
        "import sys\nfrom vllm_di.vllm import LLM\n"
        "try:\n    LLM('m', ['attention=sdap'])\n"
        "except Exception as error:\n    print(type(error).__name__, error, 'vllm' in sys.modules)"
    )
    out = _python(version, "-c", code).stdout
    assert out.startswith("VllmSlotError LLM(overrides): 'attention=sdap'")
    assert out.rstrip().endswith("False")


@contextmanager
def served(
    version: str, line: list[str], flags: list[str], log: Path, more: Mapping[str, str] = {}
) -> Iterator[str]:
    """The address of a server of vLLM's, in processes of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    flags = [*flags, "--max-model-len", "512", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(interpreter(version)), *line, *flags],
            env={**_environment(version), "VLLM_SERVER_DEV_MODE": "1", **more},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, server, log)
        yield url
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)


def ask(url: str) -> str:
    """The answer to one question."""
    [model] = httpx.get(f"{url}/v1/models", timeout=10).json()["data"]
    body = {
        "model": model["id"],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
    text: str = answer["choices"][0]["message"]["content"]
    return text


def report_of(url: str) -> dict[str, Any]:
    """What the worker's process holds and has called."""
    method = {"method": "vllm_di_report"}
    found: dict[str, Any]
    [found] = httpx.post(f"{url}/collective_rpc", json=method, timeout=60).json()["results"]
    return found


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def _python(version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(interpreter(version)), *arguments],
        env=_environment(version),
        capture_output=True,
        text=True,
        check=False,
    )


def _environment(version: str) -> dict[str, str]:
    return {**os.environ, **variables(version)}
