"""A strict program serves with the tokens of platform=cpu, and every rule that it relies on is one
that a mutant dies of."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import httpx
import pytest
import torch
from tests.components.program.strict.mutants import MUTANTS, Mutant
from tests.components.program.strict.program import StrictProgram
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import BatchPlan
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject
from vllm_di.errors import RequestError

FOLDER = str(Path(__file__).parent / "strict" / "conf")
TINY = ("model=tiny", "model.dtype=float32", "model.max_model_len=256")
STRICT = ("platform=strict", "trust=[tests]")
FEW = ("shapes.decode_seqs=[4]", "shapes.prefill_queries=[32]", "shapes.columns=[16]")
"""Three programs instead of twelve."""
PROGRAMS, PROGRAM_BYTES = 12, 64 * 1024
"""Compiled with the shapes as they are, and what each takes: see conf."""
RANKS = ("executor=multiprocess", "executor.tensor_parallel_size=2")
PROMPTS = ("a", "hello there", "x" * 70, "the quick brown fox", "z" * 5)

pytestmark = pytest.mark.filterwarnings("ignore:.*stand-in")


def tokens(*overrides: str) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(overrides=[*TINY, *overrides], config_dirs=[FOLDER]) as llm:
        return [one.outputs[0].token_ids for one in llm.generate(list(PROMPTS), greedy)]


@pytest.fixture(scope="module")
def want() -> list[list[int]]:
    return tokens("platform=cpu")


def test_it_serves_over_http(want: list[list[int]], tmp_path: Path) -> None:
    """Every step of it: chunks of prompts, decodes, scored prompts; nothing is compiled after the
    start."""
    socket = tmp_path / "api"
    command = [sys.executable, "-m", "vllm_di.cli", "serve", *TINY, *STRICT]
    command += ["--config-dir", FOLDER, f"server.unix_socket={socket}"]
    body = {"model": "tiny", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    body |= {"prompt": list(PROMPTS), "return_token_ids": True, "logprobs": 1}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        try:
            said = list(takewhile(lambda line: "listening" not in line, served.stderr))
            transport = httpx.HTTPTransport(uds=str(socket))
            with httpx.Client(transport=transport, timeout=60) as client:
                while client.get("http://engine/readyz").status_code != 200:
                    time.sleep(0.1)
                answer = client.post("http://engine/v1/completions", json=body).json()
                metrics = client.get("http://engine/metrics").text
        finally:
            served.terminate()
        said += served.stderr
    assert "choices" in answer, answer
    assert [choice["token_ids"] for choice in answer["choices"]] == want
    assert re.search(r"^vllm_di:compiles_after_ready_total\{.*\} 0.0$", metrics, re.M)
    found = dict(re.findall(r"^vllm_di:warm_up_(\w+)\{.*\} (\S+)$", metrics, re.M))
    assert float(found["programs"]) == PROGRAMS and float(found["seconds"]) > 0
    assert float(found["program_bytes"]) == PROGRAMS * PROGRAM_BYTES
    assert any(re.search(rf"ready: .* warm-up .* s, {PROGRAMS} programs, ", line) for line in said)


def test_two_ranks_meet_in_marked_collectives(want: list[list[int]]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    overrides = [*TINY, *STRICT, *FEW, *RANKS]
    with LLM(overrides=overrides, config_dirs=[FOLDER]) as llm:
        found = [one.outputs[0].token_ids for one in llm.generate(list(PROMPTS), greedy)]
        warm_up = llm.engine.report.warm_up
    assert found == want
    assert warm_up is not None and warm_up.num_programs == 2 * 3  # those of both ranks
    assert warm_up.program_bytes == 2 * 3 * PROGRAM_BYTES


SLOW = {"program=SwapsShardDims"}
"""It starts two processes: not with each run of the tests."""


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.override, marks=[pytest.mark.slow] if m.override in SLOW else [])
        for m in MUTANTS
    ],
)
def test_a_mutant_dies(mutant: Mutant, want: list[list[int]]) -> None:
    ranks = RANKS if mutant.ranks > 1 else ()
    try:
        found = tokens(*STRICT, *FEW, *ranks, *mutant.overrides)
    except Exception as error:
        reason = str(error)
    else:
        reason = "other tokens" if found != want else "it survives"
    assert re.search(mutant.reason, reason, re.DOTALL), reason


class CompilesLate(StrictProgram):
    """Compiles prompts when they come."""

    def compile(self, plan: BatchPlan) -> None:
        if plan.max_query_len == 1 or self.is_warm:
            super().compile(plan)

    is_warm = False

    def run(self, plan: BatchPlan) -> Tensor:
        self.is_warm = self.is_warm or bool(plan.slot_mapping.any())
        if plan.max_query_len > 1 and not self.is_warm:
            return torch.zeros(len(plan.logits_rows), 320)
        self.compile(plan)
        return super().run(plan)


def test_a_late_compile_is_an_error_where_shapes_are_static(
    want: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    late = ("shapes.decode_seqs=[1,4]", f"program._target_={__name__}.CompilesLate")
    with pytest.raises(RequestError, match=r"queries=32\) was not compiled at the start.*static"):
        tokens(*STRICT, *FEW, *late)
    assert tokens(*STRICT, *FEW, *late, "model_runner.static_shapes=false") == want
    assert "waited for its compiler" in caplog.text


def test_the_conformance_suite_sees_that_all_was_compiled() -> None:
    sizes = ("shapes.decode_seqs=[8]", "shapes.prefill_queries=[256]", "shapes.columns=[16]")
    overrides = [*STRICT, *sizes, "device.memory=8MiB"]
    case = "graphs/test_nothing_is_compiled_after_the_start"
    found = {}
    for program in ("StrictProgram", "CompilesLate"):
        place = f"{__name__}" if program == "CompilesLate" else StrictProgram.__module__
        late = f"program._target_={place}.{program}"
        subject = Subject([*overrides, late], config_dirs=(FOLDER,))
        try:
            report = run(subject, only=(case,), quiet=True)
        finally:
            subject.close()
        found[program] = [c.outcome for check in report.checks for c in check.cases]
    assert found == {"StrictProgram": ["pass"], "CompilesLate": ["fail"]}
