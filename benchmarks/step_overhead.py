"""What a decode step takes outside the model: schedule, batch, sample, detokenise.
``executor=inline``, default model."""

from __future__ import annotations

import time
from typing import ClassVar

from torch import Tensor

from benchmarks.figures import report
from vllm_di import LLM, SamplingParams
from vllm_di.commands.bench import prompts
from vllm_di.components.interfaces import BatchPlan
from vllm_di.components.program.eager import EagerProgram

STEPS = 60


class TimedProgram(EagerProgram):
    """Adds up the time that the model takes."""

    seconds: ClassVar[float] = 0.0

    def run(self, plan: BatchPlan) -> Tensor:
        begin = time.perf_counter()
        logits = super().run(plan)
        TimedProgram.seconds += time.perf_counter() - begin
        return logits


def main() -> None:
    """Greedy decode at batch 1 and 32; all steps but the prefills."""
    overrides = ["trust=[benchmarks]", "program._target_=benchmarks.step_overhead.TimedProgram"]
    rows: dict[str, list[float]] = {}
    with LLM(overrides=["platform=cpu", *overrides]) as llm:
        for batch in (1, 32):
            values = [overhead(llm, batch, seed) for seed in range(6)][1:]
            rows[f"batch {batch}: overhead of a step, ms"] = [1e3 * v for v, _ in values]
            rows[f"batch {batch}: the model's share, ms"] = [1e3 * m for _, m in values]
    report("step overhead", rows)


def overhead(llm: LLM, batch: int, seed: int) -> tuple[float, float]:
    """-> seconds a step outside the model, and inside."""
    params = SamplingParams(temperature=0, max_tokens=STEPS + 8, ignore_eos=True)
    generations = [llm._start(p, params, False) for p in prompts(batch, 64, 40_000, seed)]
    owner = {r.request_id: g for g in generations for r in g.requests}
    for generation in generations:
        llm._add(generation)
    for _ in range(4):  # prefills, and the first decodes
        for output in llm.engine.step().outputs:
            owner[output.request_id].feed(output)
    TimedProgram.seconds = 0.0
    begin = time.perf_counter()
    for _ in range(STEPS):
        for output in llm.engine.step().outputs:
            owner[output.request_id].feed(output)
    whole = time.perf_counter() - begin
    llm._abort(generations)
    return (whole - TimedProgram.seconds) / STEPS, TimedProgram.seconds / STEPS


if __name__ == "__main__":
    # by its full name, so that the config names the class that is read here
    from benchmarks import step_overhead

    step_overhead.main()
