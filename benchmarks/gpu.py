"""All that is to be run on a machine with an NVIDIA GPU, in one call: ``make bench-gpu``.

Tests of the kernels and the conformance suite on the device; the device's own memory bandwidth and
bf16 matrix rate; then Llama-3-8B shapes with random weights: decode steps and a prefill as shares
of these two, beside transformers in the same process. Prints a table, writes JSON.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --no-tests
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_di import LLM, SamplingParams
from vllm_di.commands.bench import prompts
from vllm_di.commands.table import print_table
from vllm_di.version import __version__

TESTS = {
    "kernels": [sys.executable, "-m", "pytest", "tests/kernels/triton/interpreted.py"],
    "port": [sys.executable, "-m", "pytest", "tests/ports/test_cuda.py", "tests/kernels/triton"],
    "conformance": [sys.executable, "-m", "vllm_di.cli", "conform", "platform=cuda"],
}
Seconds = Callable[[Sequence[list[int]], int], float]
"""(prompts as token ids, tokens to generate) -> seconds."""


@dataclass(frozen=True)
class Plan:
    """What is run. The default is the real thing; a test runs a tiny one on the host."""

    overrides: tuple[str, ...] = (
        *("platform=cuda", "model=llama3", "loader=dummy", "tokenizer=bytes"),
        *("model.dtype=bfloat16", "model.max_model_len=4096", "worker.kv_cache_memory=20GiB"),
        *("scheduler.max_num_seqs=64", "scheduler.max_num_batched_tokens=16384"),
    )
    device: str = "cuda"
    decodes: tuple[tuple[int, int], ...] = ((1, 1024), (64, 1024))
    """(batch, tokens of context before the first step)."""
    prefill: tuple[int, int] = (8, 2048)
    """(prompts, tokens of each)."""
    steps: int = 128
    runs: int = 3
    bandwidth_bytes: int = 4 * 2**30
    matrix_size: int = 8192


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    target: float | None = None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return f"{'reached' if self.value >= self.target else 'missed'} ({self.target:g})"


@dataclass(frozen=True)
class Shape:
    """What the model's sizes make of a step."""

    weight_bytes: int
    """Read in a step: all weights, but of the embedding only the rows that are looked up."""
    matrix_weights: int
    """Weights that multiply each token (without the head, which sees last tokens alone)."""
    head_weights: int
    kv_bytes: int
    """Of one token in all layers."""
    attention_flops: int
    """Of one query on one key in all layers."""

    @classmethod
    def of(cls, config: dict[str, Any], itemsize: int = 2) -> Shape:
        """From the settings of the node ``model``."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["head_dim"] or hidden // heads
        layer = (
            hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
        )
        head = hidden * config["vocab_size"]
        return cls(
            weight_bytes=(layer * layers + head) * itemsize,
            matrix_weights=layer * layers,
            head_weights=head,
            kv_bytes=2 * layers * kv_heads * size * itemsize,
            attention_flops=4 * layers * heads * size,
        )

    def decode_bytes(self, batch: int, context: int) -> int:
        """Memory that a step must read: weights once, and the context of each sequence."""
        return self.weight_bytes + batch * context * self.kv_bytes

    def prefill_flops(self, batch: int, length: int) -> int:
        """Of prompts from nothing: products, attention (causal), logits of the last tokens."""
        products = 2 * (self.matrix_weights * length + self.head_weights)
        return batch * (products + self.attention_flops * length * (length + 1) // 2)


def best(call: Callable[[], float], runs: int) -> float:
    """The least of a few seconds, after one call that does not count."""
    call()
    return min(call() for _ in range(runs))


def timed(device: str, call: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    synchronize = getattr(torch, torch.device(device).type).synchronize
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def bandwidth(plan: Plan) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(plan.bandwidth_bytes // 4, dtype=torch.float32, device=plan.device)
    target = torch.empty_like(source)
    return (
        2
        * plan.bandwidth_bytes
        / best(lambda: timed(plan.device, lambda: target.copy_(source)), 10)
    )


def matrix_rate(plan: Plan) -> float:
    """Operations a second of a square bf16 product."""
    size = plan.matrix_size
    a, b = (torch.randn(size, size, device=plan.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / best(lambda: timed(plan.device, lambda: torch.mm(a, b, out=out)), 10)


def ours(llm: LLM, device: str) -> Seconds:
    def seconds(ids: Sequence[list[int]], new: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        llm.engine.reset_prefix_cache()
        return timed(device, lambda: llm.generate(ids, params))

    return seconds


def transformers_model(config: dict[str, Any], device: str) -> Any:
    """The same sizes, random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = set(LlamaConfig().to_dict()) & set(config) - {"rope_scaling", "dtype", "architecture"}
    settings = {name: config[name] for name in sorted(names) if config[name] is not None}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**settings)).eval()
    finally:
        torch.set_default_dtype(before)


def theirs(model: Any, device: str) -> Seconds:
    """``generate``, greedy, prompts of one length."""

    def seconds(ids: Sequence[list[int]], new: int) -> float:
        tokens = torch.tensor(ids, device=device)
        fixed = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with torch.inference_mode():
            return timed(
                device,
                lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **fixed),
            )

    return seconds


def step_seconds(run: Seconds, plan: Plan, batch: int, context: int, vocab: int) -> float:
    """Of one decode step: a long generation less one of a single token."""
    times = []
    for i in range(plan.runs + 1):
        ids = prompts(batch, context, vocab, i)
        times.append((run(ids, plan.steps + 1) - run(ids, 1)) / plan.steps)
    return min(times[1:])


def prefill_seconds(run: Seconds, plan: Plan, vocab: int) -> float:
    times = [run(prompts(*plan.prefill, vocab, 100 + i), 1) for i in range(plan.runs + 1)]
    return min(times[1:])


def measure(plan: Plan) -> list[Row]:
    """The device's limits, then both engines in turn."""
    bytes_rate, flops = bandwidth(plan), matrix_rate(plan)
    rows = [
        Row("memory bandwidth", bytes_rate / 1e9, "GB/s"),
        Row("bf16 matrix rate", flops / 1e12, "TFLOP/s"),
    ]
    with LLM(overrides=list(plan.overrides)) as llm:
        config = llm.assembly.workers[0]["model"]
        shape, vocab = Shape.of(config), config["vocab_size"]
        peer = transformers_model(config, plan.device)
        runs = {"vllm-di": ours(llm, plan.device), "transformers": theirs(peer, plan.device)}
        for batch, context in plan.decodes:
            for who, run in runs.items():
                seconds = step_seconds(run, plan, batch, context, vocab)
                mean = context + plan.steps // 2
                share = shape.decode_bytes(batch, mean) / seconds / bytes_rate
                name = f"decode, batch {batch}: {who}"
                rows.append(Row(name, batch / seconds, "tokens/s"))
                aim = {1: 0.85, 64: 0.75}.get(batch) if who == "vllm-di" else None
                rows.append(Row(f"{name}, of bandwidth", share, "", aim))
        count, length = plan.prefill
        for who, run in runs.items():
            seconds = prefill_seconds(run, plan, vocab)
            share = shape.prefill_flops(count, length) / seconds / flops
            name = f"prefill {count} x {length}: {who}"
            rows.append(Row(name, count * length / seconds, "tokens/s"))
            aim = 0.70 if who == "vllm-di" else None
            rows.append(Row(f"{name}, of matrix rate", share, "", aim))
    return rows


def run_tests(commands: dict[str, list[str]]) -> dict[str, int]:
    """Name to exit status; what they print is shown."""
    root = Path(__file__).parents[1]
    return {
        name: subprocess.run(command, cwd=root, check=False).returncode
        for name, command in commands.items()
    }


def machine(device: str) -> dict[str, str]:
    module = getattr(torch, torch.device(device).type)
    name = getattr(module, "get_device_name", platform.processor)()
    return {
        "device": name,
        "torch": torch.__version__,
        "runtime": str(torch.version.cuda),
        "python": platform.python_version(),
        "vllm-di": __version__,
    }


def show(rows: list[Row], tests: dict[str, int], about: dict[str, str], path: Path | None) -> None:
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n")
    table = [[row.name, f"{row.value:.4g}", row.unit, row.verdict] for row in rows]
    table += [
        [f"tests: {name}", "passed" if not rc else "failed", "", ""] for name, rc in tests.items()
    ]
    print_table(["figure", "value", "unit", "target"], table)
    if path is not None:
        found = {"machine": about, "tests": tests, "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(found, indent=2))


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Exit status 1 when a test fails or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--no-tests", action="store_true", help="figures alone")
    options = parser.parse_args(arguments)
    plan = plan or Plan()
    tests = {} if options.no_tests else run_tests(TESTS)
    rows = measure(plan)
    show(rows, tests, machine(plan.device), options.json)
    missed = any(row.verdict.startswith("missed") for row in rows)
    return int(missed or any(tests.values()))


if __name__ == "__main__":
    sys.exit(main())
