"""A layer of experts in bf16, 8 and 4 bits, in turns on one thread. ``python -m
benchmarks.experts``."""

from __future__ import annotations

import time

import torch

from vllm_di.commands.table import print_table
from vllm_di.components.device.host import HostDevice
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.quantization.rounded import RoundedWeights

EXPERTS, CHOSEN, HIDDEN, INTER = 8, 2, 1024, 2048
TOKENS = (1, 4, 16, 64, 256)
ROUNDS = 12


def main() -> None:
    device = HostDevice(threads=1, memory_budget=None, default_dtype="bfloat16")
    library = CpuOps(device, isa="auto", compile="require", cache=None, rows_for_onednn=None)
    ops = SelectedOps(library)
    gate_up = (torch.randn(EXPERTS, 2 * INTER, HIDDEN) / HIDDEN**0.5).bfloat16()
    down = (torch.randn(EXPERTS, HIDDEN, INTER) / INTER**0.5).bfloat16()
    runs = {"bf16": lambda x, shares, ids: ops.fused_experts(x, gate_up, down, shares, ids, "silu")}
    for name, quantization in (
        ("int8", RoundedWeights(ops, bits=8, scales="channel")),
        ("int4", RoundedWeights(ops, bits=4, scales="group")),
    ):
        runs[name] = quantization.experts([*gate_up], [*down], "silu")
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
        shares, ids = torch.rand(tokens, EXPERTS).topk(CHOSEN)
        best = dict.fromkeys(runs, float("inf"))
        with torch.inference_mode():
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run(x, shares, ids)
                    best[name] = min(best[name], time.perf_counter() - start)
        times = [f"{1e3 * seconds:.2f}" for seconds in best.values()]
        times += [f"{best['bf16'] / best[name]:.2f}" for name in ("int8", "int4")]
        rows.append([str(tokens), *times])
    print_table(["tokens", *(f"{name}, ms" for name in runs), "int8 over", "int4 over"], rows)


if __name__ == "__main__":
    main()
