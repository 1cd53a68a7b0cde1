"""benchmarks/gpu, piece by piece, on the host with tiny shapes: it is written for machines that the
other tests do not have."""

from __future__ import annotations

import dataclasses
import email.message
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bundle, kernels, parts, processes, shapes
from benchmarks.gpu.cases import Case, Table
from benchmarks.gpu.compare import Found, compare, tolerance
from benchmarks.gpu.kernels import FAMILIES
from benchmarks.gpu.parts import Part
from benchmarks.gpu.processes import Job, Outcome, Rows
from packaging.requirements import Requirement

from vllm_di.components.ops.triton import TritonOps
from vllm_di.conformance.catalog import BY_NAME

ROOT = Path(__file__).parents[1]
TINY = shapes.Plan(
    overrides=(
        *("platform=cpu", "device.threads=1", "model=tiny", "model.max_model_len=128"),
        *("ops=torch", "graph=eager", "worker.num_blocks=64", "model.dtype=bfloat16"),
    ),
    device="cpu",
    decodes=((1, 8), (3, 8)),
    prefill=(2, 16),
    steps=4,
    runs=1,
    bandwidth_bytes=2**20,
    matrix_size=64,
)
LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
}


def python(name: str, text: str, **more: Any) -> Job:
    return Job(name, (sys.executable, "-c", text), rows=False, **more)


# ------------------------------------------------------------------------------------------------
# Llama-3-8B's shapes


def test_what_a_step_of_llama3_8b_moves() -> None:
    shape = shapes.Shape.of(LLAMA3_8B)
    # 8.03 billion weights, 0.53 of them in the embedding, of which rows alone are read
    assert shape.weight_bytes == pytest.approx(2 * (8.03e9 - 0.525e9), rel=1e-3)
    assert shape.kv_bytes == 131072
    assert shape.decode_bytes(64, 1024) - shape.weight_bytes == 64 * 1024 * 131072
    # two operations a weight and token, and a few percent for attention
    products = 2 * 6.98e9 * 8 * 2048
    assert 1.02 * products < shape.prefill_flops(8, 2048) < 1.06 * products


def test_all_figures_on_the_host(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    shapes.measure(TINY, Rows(out))
    rows = {row["name"]: row for row in processes.read_rows(out)}
    assert not gpu.failed(list(rows.values())), rows
    for who in ("vllm-di", "vllm-di, eager", "transformers"):
        for name in ("decode, batch 1", "decode, batch 3", "prefill 2 x 16"):
            assert rows[f"{name}: {who}"]["value"] > 0
    assert rows["memory bandwidth"]["value"] > 0 and rows["bf16 matrix rate"]["value"] > 0
    aims = {name: row["target"] for name, row in rows.items() if row.get("target")}
    assert aims == {
        "decode, batch 1: vllm-di, of bandwidth": 0.85,
        "prefill 2 x 16: vllm-di, of matrix rate": 0.7,
    }
    told = rows["where time goes"]["found"]
    assert told.keys() == {"decode 1 x 8, 16 steps", "decode 3 x 8, 16 steps", "prefill 2 x 16"}
    assert all(part["host"] for part in told.values())


def test_a_failing_engine_does_not_stop_its_peer(tmp_path: Path) -> None:
    bad = dataclasses.replace(TINY, eager=("attention=nothing",))
    out = tmp_path / "rows"
    shapes.measure(bad, Rows(out))
    rows = {row["name"]: row for row in processes.read_rows(out)}
    assert [row["name"] for row in gpu.failed(list(rows.values()))] == ["vllm-di, eager"]
    assert "nothing" in rows["vllm-di, eager"]["error"]
    assert rows["prefill 2 x 16: transformers"]["value"] > 0


def test_a_plan_is_read_as_it_is_written(tmp_path: Path) -> None:
    shapes.write_plan(TINY, tmp_path / "plan.json")
    assert shapes.plan_of(tmp_path / "plan.json") == TINY
    plan = shapes.plan_of(None)
    assert plan.device == "cuda" and "model=llama3" in plan.overrides
    assert plan.decodes == ((1, 1024), (64, 1024)) and plan.prefill == (8, 2048)


# ------------------------------------------------------------------------------------------------
# processes and their limits


def test_jobs_end_each_in_its_own_way(tmp_path: Path) -> None:
    hangs = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    jobs = [
        python("good", "print('done')"),
        python("bad", "raise SystemExit('why it failed')"),
        python("crash", "import os; os.abort()"),
        Job("slow", ("sh", "-c", "echo begun; exec sleep 600"), rows=False, seconds=1.5),
        python("deaf", hangs, seconds=0.5),
        python(
            "named", "import os; print(os.environ['OF_THIS_JOB'])", environment={"OF_THIS_JOB": "1"}
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "GRACE", 0.5)
        told: list[str] = []
        found = processes.run(jobs, tmp_path, 60, 4, lambda one: told.append(one.name))
    status = {one.name: one.status for one in found}
    assert status == {
        "good": "passed",
        "bad": "failed",
        "crash": "failed",
        "slow": "cut off",
        "deaf": "cut off",
        "named": "passed",
    }
    by_name = {one.name: one for one in found}
    assert "why it failed" in by_name["bad"].tail and "begun" in by_name["slow"].tail
    assert by_name["crash"].code == -6 and sorted(told) == sorted(status)


def test_no_time_left_is_not_run(tmp_path: Path) -> None:
    jobs = [python("one", "import time; time.sleep(600)"), python("two", "")]
    found = processes.run(jobs, tmp_path, 0.3, 1)
    assert [one.status for one in found] == ["cut off", "not run"]


def test_a_kernel_that_fails_stops_no_other(tmp_path: Path) -> None:
    """Wrong numbers, an error and a crash of the whole process, each told by name."""
    job = parts.module("kernels", "tests.bad_kernel_cases:cases", "--device", "cpu", resumes=True)
    (found,) = processes.run([job], tmp_path, 120, 1)
    rows = {row["name"]: row for row in found.rows}
    passed = {name: row["passed"] for name, row in rows.items()}
    assert passed == {
        "right": True,
        "wrong": False,
        "crashing": False,
        "raising": False,
        "right again": True,
    }
    assert (found.status, found.starts) == ("failed", 2)
    assert rows["wrong"]["error"] == 0.5 and rows["wrong"]["ratio"] == 5
    assert rows["wrong"]["note"] == "worst at [1]: 2.5, not 2"
    assert "in raising" in rows["raising"]["trace"] and "PTX" in rows["raising"]["error"]
    assert rows["crashing"]["error"] == "killed by 6" and "Abort" in rows["crashing"]["trace"]


def test_a_case_waits_for_the_memory_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    full = [torch.OutOfMemoryError("full"), torch.OutOfMemoryError("full")]

    def judge(table: Table) -> list[Found]:
        if full:
            raise full.pop()
        return [compare(torch.ones(2), torch.ones(2), 0, 0)]

    case = Case("late", judge)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    found = kernels.judged(case, Table("cpu"))
    assert (found["passed"], found["waited_for_memory"], len(slept)) == (True, 2, 2)
    full += [torch.OutOfMemoryError("full")] * (1 + len(kernels.WAITS))
    with pytest.raises(torch.OutOfMemoryError):
        kernels.judged(case, Table("cpu"))


def test_kernels_and_their_rates_in_the_interpreter(tmp_path: Path) -> None:
    """Cases of two families beside the reference, and a rate, as they run on a device."""
    pytest.importorskip("triton")
    cpu = ("--device", "cpu")
    sizes = ("--scale", "512", "--matrix-size", "64", "--bandwidth-bytes", "1000000")
    jobs = [
        parts.module("kernels", "write_kv", *cpu, "--stop", "1", job="write"),
        parts.module("kernels", "attention-edges-float32", *cpu, "--stop", "2", job="attention"),
        parts.module("rates", *cpu, *sizes, "--match", "rms_norm 1 x", job="rates"),
    ]
    interpreted = {"TRITON_INTERPRET": "1"}
    jobs = [Job(job.name, job.command, environment=interpreted) for job in jobs]
    found = {one.name: one for one in processes.run(jobs, tmp_path, 240, 2)}
    assert {one.status for one in found.values()} == {"passed"}, found
    assert [row["passed"] for row in found["attention"].rows] == [True, True]
    assert {row["name"] for row in found["rates"].rows} > {"rms_norm 1 x 4096"}
    assert all(row.get("seconds", 1) > 0 for row in found["rates"].rows)


def test_figures_of_a_comparison() -> None:
    nan, inf = float("nan"), float("inf")
    same = torch.tensor([nan, inf, -inf, 1.0])
    assert compare(same, same.clone(), 0.0, 0.0).passed
    other = compare(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0]), 0.1, 0.1)
    assert not other.passed and other.wrong == 1
    assert not compare(torch.ones(2), torch.ones(3), 1.0, 1.0).passed
    assert compare(torch.ones(0), torch.ones(0), 0.0, 0.0).passed
    assert tolerance(torch.int64, long=False) == (0.0, 0.0)
    assert tolerance(torch.bfloat16, long=True) == (1.6e-2, 2e-2)


# ------------------------------------------------------------------------------------------------
# the whole run


def test_a_budget_is_shared_out_and_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "import json, sys; print(json.dumps({'name': 'share', 'value': 0.5, 'target': 0.75}),"
    rows += " file=open(sys.argv[-1], 'w'))"
    listed = (
        Part("first", (python("good", ""), python("bad", "raise SystemExit(3)")), limit=30),
        Part("figures", (Job("rates", (sys.executable, "-c", rows)),), limit=30),
        Part("kept", (python("never", ""),), limit=30, keep=1e6),
        Part("last", (python("end", ""),), limit=30, keep=1e6),  # nothing comes behind it
    )
    path = tmp_path / "gpu.json"
    assert gpu.run(listed, 60, 2, tmp_path, path) == 1
    found = json.loads(path.read_text())["parts"]
    status = {job["name"]: job["status"] for p in found.values() for job in p["jobs"].values()}
    assert status == {
        "good": "passed",
        "bad": "failed",
        "rates": "passed",
        "never": "not run",
        "end": "passed",
    }
    assert "share: 0.5, below 0.75" in capsys.readouterr().out


def test_without_a_device_nothing_else_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Part("machine", (python("machine", "raise SystemExit(1)"),), 30, needed=True)
    assert gpu.run((machine, Part("rest", (python("rest", ""),), 30)), 60, 1, tmp_path, None) == 1
    assert "rest: rest: not run" in capsys.readouterr().out


def test_what_is_known_stands_on_disk_after_each_job(tmp_path: Path) -> None:
    report, part = gpu.Report(tmp_path / "gpu.json"), Part("one", (), limit=1)
    report.begin(part, 1)
    report.add(part, Outcome("first", status="cut off", rows=[{"name": "x", "passed": True}]))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["parts"]["one"]["jobs"]["first"]["rows"] == [{"name": "x", "passed": True}]


def test_the_parts_name_what_exists(tmp_path: Path) -> None:
    listed = parts.parts(FAMILIES, tmp_path, None)
    assert [part.name for part in listed] == [
        "machine",
        "correct",
        "conformance",
        "rates",
        "shapes",
    ]
    assert sum(part.keep + part.limit > 540 for part in listed) == 0
    for job in (job for part in listed for job in part.jobs):
        for word in job.command:
            assert not word.startswith("tests/") or (ROOT / word).exists()
    assert {name for words in parts.CHECKS.values() for name in words.split()} <= BY_NAME.keys()
    tested = {name for name in FAMILIES if not name.startswith("attention-")} | {"paged_attention"}
    assert tested == TritonOps.implements - {"fused_experts"}  # which the suite judges there
    with pytest.raises(SystemExit):
        gpu.main(["--only", "machin", "--logs", str(tmp_path)])


# ------------------------------------------------------------------------------------------------
# the bundle


def wheel(folder: Path, name: str, *needs: str) -> Path:
    told = email.message.Message()
    told["Name"] = name
    for need in needs:
        told["Requires-Dist"] = need
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", told.as_string())
    return path


def test_a_bundle_takes_what_the_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requirements of requirements too, by the target's markers and not this machine's."""
    known = {
        "hydra-core": ("omegaconf>=2.2", "antlr4-python3-runtime==4.9.*"),
        "omegaconf": ("antlr4-python3-runtime==4.9.*", "numpy"),
        "starlette": ("anyio", "typing-extensions; python_version < '3.13'", "x; extra == 'full'"),
        "uvicorn": ("backport; python_version < '3.12'", "colorama; sys_platform == 'win32'"),
    }
    asked = []

    def fetch(requirement: Requirement, _target: Any, folder: Path, _constraints: Path) -> Path:
        asked.append(requirement.name)
        return wheel(folder, requirement.name, *known.get(requirement.name, ()))

    monkeypatch.setattr(bundle, "fetch", fetch)
    target = bundle.Target("3.12", "x86_64", frozenset(bundle.THERE.split()))
    bundle.collect(target, tmp_path / "wheels", tmp_path)
    assert len(asked) == len(set(asked))
    assert set(asked) == {
        *("antlr4-python3-runtime", "dependency-injector", "gguf", "hydra-core", "minijinja"),
        *("llguidance", "msgspec", "omegaconf", "orjson", "starlette", "uvicorn"),
    }
    older = bundle.Target("3.11", "x86_64", frozenset(bundle.THERE.split()))
    asked.clear()
    bundle.collect(older, tmp_path / "more", tmp_path)
    assert "backport" in asked


def test_wheels_are_asked_for_by_target() -> None:
    words = list(bundle.Target("3.12", "x86_64", frozenset()).options())
    assert words[:2] == ["--python-version", "3.12"]
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(words)


def test_a_bundle_holds_the_project_and_its_script(tmp_path: Path) -> None:
    tmp_path /= "project"
    bundle.copy_project(tmp_path)
    for name in ("pyproject.toml", "src/vllm_di/cli.py", "benchmarks/gpu/kernels.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (tmp_path / ".venv").exists()
    commits = [
        subprocess.run(["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True).stdout
        for place in (ROOT, tmp_path)
    ]
    assert commits[0] == commits[1] != b""
    assert bundle.size(tmp_path) < 30
    script = tmp_path / "run.sh"
    script.write_text(bundle.RUN)
    subprocess.run(["bash", "-n", str(script)], check=True)
