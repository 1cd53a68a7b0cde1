"""Beside transformers' ``generate``, in turns in one process: bf16, greedy, fixed lengths, default
model, two threads."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import report
from vllm_di import LLM, SamplingParams
from vllm_di.commands.bench import prompts

RUNS = 3
NEW = 33


def main() -> None:
    """Decode at batch 1 and 8, prefill of one prompt of 1,024 tokens."""
    rows: dict[str, list[float]] = {}
    with LLM(overrides=["platform=cpu", "device.threads=2"]) as llm:
        weights = Path(llm.assembly.settings["checkpoint"]["weights"])
        theirs = load(weights)
        for batch in (1, 8):
            ours_rates, their_rates = [], []
            for run in range(RUNS + 1):
                ids = prompts(batch, 128, 40_000, run)
                ours_rates.append(decode_rate(lambda n, ids=ids: ours(llm, ids, n), batch))
                their_rates.append(decode_rate(lambda n, ids=ids: generate(theirs, ids, n), batch))
            add(rows, f"decode, batch {batch}, tokens/s", ours_rates[1:], their_rates[1:])
        pairs = []
        for run in range(RUNS + 1):
            ids = prompts(1, 1024, 40_000, 100 + run)
            pairs.append((1024 / ours(llm, ids, 1), 1024 / generate(theirs, ids, 1)))
        add(rows, "prefill 1 x 1024, tokens/s", *map(list, zip(*pairs[1:], strict=True)))
    report("vllm-di beside transformers", rows)


def add(rows: dict[str, list[float]], name: str, mine: list[float], other: list[float]) -> None:
    rows[f"{name}: vllm-di"] = mine
    rows[f"{name}: transformers"] = other
    rows[f"{name}: ratio"] = [a / b for a, b in zip(mine, other, strict=True)]
    print(f"{name}: {statistics.median(rows[f'{name}: ratio']):.2f} x")


def load(weights: Path) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).eval()


def decode_rate(seconds: Any, batch: int) -> float:
    """Tokens a second after the first token."""
    first, whole = seconds(1), seconds(NEW)
    return float(batch * (NEW - 1) / (whole - first))


def ours(llm: LLM, ids: list[list[int]], count: int) -> float:
    llm.engine.reset_prefix_cache()
    begin = time.perf_counter()
    llm.generate(ids, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
    return time.perf_counter() - begin


def generate(model: Any, ids: list[list[int]], count: int) -> float:
    tokens = torch.tensor(ids)
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
        )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
