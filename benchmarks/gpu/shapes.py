"""Llama-3-8B shapes with random weights: decode steps and a prefill as shares of what the device
can do, with graphs, eager, and beside transformers in the same process.

    python -m benchmarks.gpu.shapes

A row for each figure as soon as it is known; then where the time of a step goes, by kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.limits import bandwidth, matrix_rate, timed
from benchmarks.gpu.processes import Rows
from vllm_di import LLM, SamplingParams
from vllm_di.commands.bench import prompts
from vllm_di.components.interfaces import Loader, Model

Seconds = Callable[[Sequence[list[int]], int], float]
"""(prompts as token ids, tokens to generate) -> seconds."""
INIT_STD = 0.02


@dataclass(frozen=True)
class Plan:
    """What is measured. The default is the real thing; a test runs a tiny one on the host."""

    overrides: tuple[str, ...] = (
        *("platform=cuda", "model=llama3", "loader=dummy", "tokenizer=bytes"),
        *("model.dtype=bfloat16", "model.max_model_len=4096", "worker.kv_cache_memory=20GiB"),
        *("scheduler.max_num_seqs=64", "scheduler.max_num_batched_tokens=16384"),
    )
    eager: tuple[str, ...] = ("graph=eager",)
    device: str = "cuda"
    decodes: tuple[tuple[int, int], ...] = ((1, 1024), (64, 1024))
    """(batch, tokens of context before the first step)."""
    prefill: tuple[int, int] = (8, 2048)
    """(prompts, tokens of each)."""
    steps: int = 64
    runs: int = 2
    bandwidth_bytes: int = 4 * 2**30
    matrix_size: int = 8192


class RandomOnDevice(Loader):
    """Random weights made where they stay: on the host, those of 8 billion take a minute."""

    def __init__(self, device: str) -> None:
        self._device = device

    @torch.no_grad()
    def load(self, model: Model) -> None:
        decoder: Any = model
        generator = torch.Generator(self._device).manual_seed(0)
        for target in decoder.targets().values():
            made = torch.empty(target.shape, dtype=torch.bfloat16, device=self._device)
            if target.kind == "weight":
                made.normal_(0, INIT_STD, generator=generator)
            else:
                made.fill_(1.0 if target.kind == "norm" else 0.0)
            target.fill(made)
        decoder.finalize()


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


def figures(
    who: str, run: Seconds, plan: Plan, config: dict[str, Any], limits: tuple[float, float]
) -> Callable[[Rows], None]:
    """Measures one engine and writes each figure."""

    def write(row: Rows) -> None:
        shape, vocab = Shape.of(config), config["vocab_size"]
        ours = who == "vllm-di"
        for batch, context in plan.decodes:
            seconds = step_seconds(run, plan, batch, context, vocab)
            mean = context + plan.steps // 2
            share = shape.decode_bytes(batch, mean) / seconds / limits[0]
            name = f"decode, batch {batch}: {who}"
            row(name=name, value=batch / seconds, unit="tokens/s", step=seconds)
            aim = {1: 0.85, 64: 0.75}.get(batch) if ours else None
            row(name=f"{name}, of bandwidth", value=share, unit="", target=aim)
        count, length = plan.prefill
        seconds = prefill_seconds(run, plan, vocab)
        share = shape.prefill_flops(count, length) / seconds / limits[1]
        name = f"prefill {count} x {length}: {who}"
        row(name=name, value=count * length / seconds, unit="tokens/s", step=seconds)
        aim = 0.70 if ours else None
        row(name=f"{name}, of matrix rate", value=share, unit="", target=aim)

    return write


def where_time_goes(llm: LLM, plan: Plan, vocab: int) -> dict[str, Any]:
    """Microseconds by kernel on the device, and by call on the host: of a few decode steps at each
    batch, behind a prompt that the prefix cache holds, and of a prefill."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if plan.device == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def told(batch: int, length: int, new: int, *, cached: bool) -> dict[str, Any]:
        ids = prompts(batch, length, vocab, 1)
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        llm.engine.reset_prefix_cache()
        llm.generate(ids, params)
        if not cached:
            llm.engine.reset_prefix_cache()
        with profile(activities=activities) as profiled:
            timed(plan.device, lambda: llm.generate(ids, params))
        averages = profiled.key_averages()
        return {
            "device": _longest(averages, "self_device_time_total"),
            "host": _longest(averages, "self_cpu_time_total"),
        }

    found = {f"decode {b} x {c}, 16 steps": told(b, c, 16, cached=True) for b, c in plan.decodes}
    count, length = plan.prefill
    return found | {f"prefill {count} x {length}": told(count, length, 1, cached=False)}


def _longest(averages: Any, what: str) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds) of the thirty that take most."""
    listed = [(one.key[:100], one.count, round(getattr(one, what, 0.0), 1)) for one in averages]
    return sorted((one for one in listed if one[2] > 0), key=lambda one: -one[2])[:30]


def measure(plan: Plan, row: Rows) -> None:
    """The device's limits, this engine with graphs and eager, then transformers. What fails is a
    row, and the rest goes on."""
    limits = (
        bandwidth(plan.device, plan.bandwidth_bytes),
        matrix_rate(plan.device, plan.matrix_size),
    )
    row(name="memory bandwidth", value=limits[0] / 1e9, unit="GB/s")
    row(name="bf16 matrix rate", value=limits[1] / 1e12, unit="TFLOP/s")
    config: dict[str, Any] = {}

    def engine(who: str, overrides: tuple[str, ...], *, profiled: bool) -> None:
        loader = RandomOnDevice(plan.device)
        with LLM(overrides=[*plan.overrides, *overrides], loader=loader) as llm:
            config.update(llm.assembly.stages[0]["model"])
            figures(who, ours(llm, plan.device), plan, config, limits)(row)
            if profiled:
                row(name="where time goes", found=where_time_goes(llm, plan, config["vocab_size"]))

    def peer() -> None:
        model = transformers_model(config, plan.device)
        figures("transformers", theirs(model, plan.device), plan, config, limits)(row)

    parts: dict[str, Callable[[], None]] = {
        "vllm-di": lambda: engine("vllm-di", (), profiled=False),
        "vllm-di, eager": lambda: engine("vllm-di, eager", plan.eager, profiled=True),
        "transformers": peer,
    }
    for who, part in parts.items():
        try:
            part()
        except Exception as error:  # the rows of the others are wanted all the same
            trace = traceback.format_exc()[-6000:]
            row(name=who, passed=False, error=f"{type(error).__name__}: {error}", trace=trace)
        if plan.device == "cuda":
            torch.cuda.empty_cache()


def plan_of(path: Path | None) -> Plan:
    """The default, changed by a file of JSON."""
    if path is None:
        return Plan()
    changes = json.loads(path.read_text())
    deep = {key: _tuples(value) for key, value in changes.items()}
    return replace(Plan(), **deep)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def write_plan(plan: Plan, path: Path) -> None:
    path.write_text(json.dumps(asdict(plan)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Llama-3-8B shapes")
    parser.add_argument("--plan", type=Path, help="JSON: other sizes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    measure(plan_of(options.plan), Rows(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
