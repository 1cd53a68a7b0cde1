"""``ops=xpu_kernels`` on a simulated device. Run in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import OpTable, Placement
from vllm_di.components.ops.torch import TorchOps
from vllm_di.conformance.checks.test_ops import compare
from vllm_di.conformance.op_cases import cases
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError
from vllm_di.ports.xpu import vendor
from vllm_di.ports.xpu.ops import XpuKernels

XPU = ["platform=xpu", "device.simulated=true", "model=tiny", "loader=dummy"]
OPS = ("rms_norm", "add_rms_norm", "silu_and_mul", "rotary_embedding", "fused_qk_norm_rope")
EACH = [f"ops.{op}=xpu_kernels" for op in OPS]


@contextmanager
def parts(*overrides: str) -> Iterator[Any]:
    assembly = assemble([*XPU, *overrides])
    with opened(
        WorkerContainer, assembly, placement=Placement(), only=("ops", "device")
    ) as container:
        yield container


def check_ops_equal_the_reference() -> None:
    """On the conformance suite's inputs."""
    with parts("ops=xpu_kernels", "attention=sdpa") as container, torch.inference_mode():
        table, device = container.ops(), container.device().torch_device
        for op in sorted(XpuKernels.implements):
            assert isinstance(table.library_of(op), XpuKernels)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for case in cases(op, dtype, 3):
                    try:
                        compare(table, op, case, device)
                    except Exception as error:
                        raise AssertionError(f"{op} {dtype} {case.label}: {error}") from error


def check_the_fused_kernel_runs_where_it_can() -> None:
    """Sizes that it was not compiled for take norm and rotary, both Intel's."""
    called: list[str] = []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(torch.ops._C, name)

    with parts("ops=xpu_kernels", "attention=sdpa") as container:
        ops = container.ops().library_of("fused_qk_norm_rope")
        device = container.device().torch_device
        ops._kernels = Noting()
        unfused = ["rms_norm", "rms_norm", "rotary_embedding"]
        for size, rotary, dtype, wanted in (
            (64, 64, torch.bfloat16, ["fused_qk_norm_rope"]),
            (128, 64, torch.float16, ["fused_qk_norm_rope"]),
            (128, 96, torch.bfloat16, unfused),  # lanes would not pair
            (64, 64, torch.float32, unfused),
            (80, 80, torch.bfloat16, unfused),
        ):
            called.clear()
            weight = torch.ones(size, dtype=dtype, device=device)
            ops.fused_qk_norm_rope(
                torch.arange(3, dtype=torch.int64).to(device),
                torch.randn(3, 8 * size).to(dtype).to(device),
                *(4, 2, weight, weight, 1e-5),
                torch.randn(8, rotary).to(device),
                False,
            )
            assert called == wanted, (size, rotary, dtype, called)


def check_a_model_with_norms_of_queries_and_keys() -> None:
    """Chosen op by op beside Triton's, in captured graphs too: the reference's tokens."""

    def tokens(*overrides: str) -> list[list[int]]:
        small = ["worker.num_blocks=64", "scheduler.max_num_seqs=4"]
        small += ["scheduler.max_num_batched_tokens=64", "model.qk_norm=true"]
        small += ["model.dtype=float32", "model=tiny", "loader=dummy"]
        with LLM(overrides=[*small, *overrides]) as llm:
            prompts = ["one", "a somewhat longer prompt than the first"]
            found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
        return [list(answer.outputs[0].token_ids) for answer in found]

    wanted = tokens("platform=cpu", "ops=torch", "attention=sdpa")
    simulated = ["platform=xpu", "device.simulated=true"]
    assert tokens(*simulated, *EACH) == wanted
    assert tokens(*simulated) == wanted


def check_explain_says_what_runs() -> None:
    runs = {row.op: row.runs_on for row in explain(assemble([*XPU, *EACH])).ops}
    assert runs["rms_norm"] == "vllm-xpu-kernels (simulated: stand-ins)"
    assert runs["fused_qk_norm_rope"].endswith("in bf16 and fp16, others unfused")
    assert runs["paged_attention"].startswith("simulated: the reference stands in for the Triton")


def check_a_changed_or_missing_operator_is_refused() -> None:
    kept = dict(vendor.SCHEMAS)
    with parts() as container:
        device = container.device()
        try:
            vendor.SCHEMAS["_C::silu_and_mul"] = "(Tensor! result, Tensor a, Tensor b) -> ()"
            with pytest.raises(ConfigError, match=r"silu_and_mul has changed.*take vllm-xpu-"):
                vendor.load(device, simulated=True)
            vendor.SCHEMAS |= kept | {"_C::no_such": "(Tensor a) -> ()"}
            with pytest.raises(ConfigError, match=r"no_such is missing: .*pip install vllm-xpu-"):
                vendor.load(device, simulated=True)
        finally:
            vendor.SCHEMAS.clear()
            vendor.SCHEMAS.update(kept)


def check_what_the_package_lacks_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match=r"ops\.linear: XpuKernels does not implement it"),
        parts("ops.linear=xpu_kernels"),
    ):
        pass
    assert "linear" in OpTable.OPS and TorchOps.implements > XpuKernels.implements
