"""``vllm-di simulate`` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation.made_up import TINY, times

from vllm_di.cli import main
from vllm_di.components.drafter.none import NoDrafter

LITTLE = [
    *TINY,
    "model.dtype=float32",
    "device.threads=1",
    "scheduler.max_num_seqs=4",
    "scheduler.max_num_batched_tokens=64",
    "model.max_model_len=256",
]


STAGES = ["stages.0.model.layers=[0,1]", "stages.1.model.layers=[1,2]"]


@pytest.fixture
def steps(tmp_path: Path) -> str:
    path = tmp_path / "cpu-steps.json"
    times().write(path)
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """-> exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *words])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_layouts_stand_beside_each_other(
    steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = "executor.data_parallel_size=3", "platform=split_cpu_cpu executor.prefill_replicas=2"
    path = tmp_path / "found.json"
    words = ["--steps", steps, "--layout", one, "--layout", two, "--bandwidth", "1GB/s"]
    words += ["--num-prompts", "30", "--input-len", "uniform:20,40", "--output-len", "4"]
    chunk = "scheduler.max_num_batched_tokens=512"
    status, out, err = call(capsys, *TINY, chunk, *words, "--json", str(path))
    assert (status, err) == (0, "")
    assert f"layout 1: {one}\nlayout 2: {two}\n" in out
    head = next(line for line in out.splitlines() if line.startswith("figure"))
    assert head.split() == ["figure", "layout", "1", "layout", "2"]
    assert "cpu-steps.json: tiny on platform=cpu, none, 2026-11-28: 56 steps" in out
    assert "30 requests, 16 at a time; prompts of uniform:20,40 tokens; answers of 4" in out
    data = json.loads(path.read_text())
    first, second = data["layouts"]
    assert first["figures"]["ranks"] == second["figures"]["ranks"] == 3
    assert first["figures"]["requests answered"] == second["figures"]["requests answered"] == 30
    assert second["figures"]["handed over, tokens"] > 0
    assert len(first["utilisation"]) == 3
    assert set(second["utilisation"][0]) == {"decode", "prefill 0", "prefill 1"}


def test_torch_is_not_imported(steps: str) -> None:
    code = (
        "import sys; from vllm_di.cli import run; run(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    words = ["simulate", *TINY, "--steps", steps, "--num-prompts", "3"]
    words += ["--layout", "platform=split_cpu_cpu scheduler.max_num_batched_tokens=512"]
    words += ["--bandwidth", "1GB", "--layout", "executor.data_parallel_size=2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_steps_are_measured_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    status, out, _ = call(capsys, "measure", *LITTLE, "-o", str(path), "--repeats", "1")
    assert status == 0 and "steps that the fit did not see it is off by" in out
    words = ["--steps", str(path), "--num-prompts", "20", "--input-len", "30"]
    status, out, _ = call(capsys, *LITTLE, *words, "--layout", "executor.data_parallel_size=2")
    assert status == 0 and "between tokens p99, ms" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["mesure"], "'mesure' is neither an override nor measure; did you mean 'measure'?"),
        ([], "--steps FILE names the step times of a platform"),
        (["--step", "x"], "simulate has no flag '--step'; did you mean '--steps'?"),
        (["--steps", "nowhere.json"], "nowhere.json: no file of step times"),
        (["--repeats", "2", "--steps", "STEPS"], "--repeats: vllm-di simulate without `measure`"),
        (["measure"], "-o FILE is where the step times go"),
        (["measure", "-o", "x", "--steps", "y"], "--steps: vllm-di simulate measure takes no such"),
        (["measure", "-o", "x", "--clock", "wal"], "did you mean 'wall'?"),
        (["measure", "-o", "x", "platform=split_cpu_cpu"], "measure the platform of each role"),
        (["--steps", "STEPS", "--request-rate", "0"], "--request-rate: expected a number above 0"),
        (["--steps", "STEPS", "--request-rate", "1", "--concurrency", "1"], "give one of the two"),
        (["--steps", "STEPS", "--prefix-share", "2", "--prefixes", "1"], "a share from 0 to 1"),
        (["--steps", "STEPS", "--prefix-len", "2"], "--prefix-len: it counts where --prefixes"),
        (["--steps", "STEPS", "--input-len", "lognorml:1,1"], "did you mean 'lognormal'?"),
        (["--steps", "STEPS", "--bandwidth", "fast"], "--bandwidth: 'fast' is not a size"),
        (["--steps", "STEPS", "--layout", "replicas 4"], "'replicas' is no override"),
        (["--steps", "STEPS", "--layout", "'"], '--layout "\'": No closing quotation'),
        (["--steps", "STEPS", "--layout", "atention=sdpa"], "did you mean 'attention'?"),
        (["--steps", "STEPS", "scheduler.max_num_seqs=many"], "Expected `int`"),
        (
            ["--steps", "STEPS", "attention=sdpa"],
            "was measured with attention._target_=vllm_di.components.attention.paged",
        ),
        (["--steps", "STEPS", "device.threads=1"], "measured with device.threads=null, and here"),
        (["--steps", "STEPS", "platform=openvino"], "cpu-steps.json has those of platform=cpu"),
        (
            ["--steps", "STEPS", "executor=multiprocess", "executor.tensor_parallel_size=2"],
            "was measured with 1 ranks, and here are 2",
        ),
        (
            ["--steps", "STEPS", "platform=hybrid_cpu_openvino", *STAGES],
            "2 stages (default): a pipeline",
        ),
        (["--steps", "STEPS", "worker.num_blocks=3"], "room for 3 blocks, but one sequence"),
        (["--steps", "STEPS", "worker.num_blocks=x"], "worker.num_blocks: Expected `int`"),
        (["--steps", "STEPS", "platform=split_cpu_cpu"], "say how fast, such as --bandwidth"),
    ],
)
def test_what_is_wrong_has_a_place(
    steps: str, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    words = [steps if word == "STEPS" else word for word in words]
    chunk = "scheduler.max_num_batched_tokens=512"
    given = [o for o in TINY if o.split("=")[0] not in {w.split("=")[0] for w in words}]
    status, _, err = call(capsys, *words, *given, *([] if "measure" in words else [chunk]))
    assert status == 2
    assert text in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["measure", "-o", "x"], []], ids=["measured", "simulated"])
def test_drafts_are_refused(
    steps: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NoDrafter, "max_drafts", 2)
    given = [*words, *LITTLE] if words else [*TINY, "--steps", steps]
    status, _, err = call(capsys, *given)
    assert status == 2
    assert "conf/drafter/none.yaml:2: drafter: NoDrafter: which drafts prove right" in err
