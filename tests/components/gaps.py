"""Judges a platform's ops and attention with torch products that read the gaps between rows, as
oneDNN's do on some CPUs.

``python -m tests.components.gaps OVERRIDE ...`` does so in a process of its own, for settings that
torch reads when it is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vllm_di.components.products import NARROW
from vllm_di.conformance.op_cases import MAKERS
from vllm_di.conformance.report import Report
from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject

CHECKS = (
    *(f"ops/test_op[{op}-bfloat16]" for op in MAKERS),
    *("ops/test_op[linear-float16]", "prefill/test_lengths[bfloat16]", "decode/test_soft_cap"),
    *("decode/test_mixed[bfloat16]", "kv/test_attention_writes[bfloat16]"),
)
"""Of the suite: every op and attention, on inputs with NaN between their rows."""
PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "addmv", "attention")
"""What the names of torch's operators for products end in, or hold."""


class GapsRefused(TorchDispatchMode):
    """A product of a narrow tensor with gaps is an error."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_products = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.endswith(PRODUCTS) or "attention" in name:
            self.num_products += 1
            for x in tree_iter((args, kwargs)):
                if isinstance(x, Tensor) and x.dtype in NARROW and has_gaps(x):
                    raise AssertionError(f"{name} reads {tuple(x.shape)} by {x.stride()}")
        return func(*args, **(kwargs or {}))


def has_gaps(x: Tensor) -> bool:
    """Whether there is memory between its elements that is not its own."""
    expected = 1
    sizes = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    for stride, size in sorted(sizes):
        if stride not in (0, expected):  # 0: the same row again
            return x.numel() > 0
        expected *= size if stride else 1
    return False


def judged(*overrides: str) -> Report:
    subject = Subject(overrides)
    try:
        with GapsRefused() as mode:
            report = run(subject, only=CHECKS, quiet=True)
        assert mode.num_products > 100, f"{mode.num_products} products were seen"
        return report
    finally:
        subject.close()


def main() -> int:
    report = judged(*sys.argv[1:])
    passed = sum(case.outcome == "pass" for check in report.checks for case in check.cases)
    for case in report.failed:
        sys.stdout.write(f"{case.id}: {case.message}\n")
    sys.stdout.write(f"{passed} passed\n")
    return 1 if report.failed or passed < 10 else 0


if __name__ == "__main__":
    sys.exit(main())
