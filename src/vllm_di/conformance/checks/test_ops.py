"""Every op against the torch reference in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di.components.interfaces import OpTable
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.conformance.numbers import DTYPES, assert_close
from vllm_di.conformance.op_cases import MAKERS, OpCase, cases
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject

LEAST_CASES = 64
REFERENCE = TorchOps()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", MAKERS)
def test_op(subject: Subject, record: Record, op: str, dtype: str) -> None:
    kind = subject.dtype(dtype)
    if OpTable.OPS[op].fp32 and dtype != "float32":
        raise NotDeclared("its input is fp32 whatever the model's dtype")
    if OpTable.OPS[op].quantized and not subject.declared.quantization:
        raise NotDeclared("no quantization")
    record.feature(dtype)
    count = 0
    with subject.parts("ops", "device") as container, torch.inference_mode():
        ops, device = container.ops(), container.device().torch_device
        for case in cases(op, kind, subject.seed):
            try:
                compare(ops, op, case, device)
            except Exception as error:
                raise AssertionError(f"{op} {case.label}: {error}") from error
            count += 1
    assert count >= LEAST_CASES, f"{count} cases"
    record.figure(cases=count)


def compare(ops: OpTable, op: str, case: OpCase, device: torch.device) -> None:
    """Raises AssertionError."""
    args = [_moved(a, device) for a in case.args]
    inputs = [a.clone() if isinstance(a, Tensor) else a for a in args]
    packed = list(args)
    if case.pack:
        packed[1] = getattr(ops, case.pack)(args[1])
    wide = [_wide(a) for a in case.args]
    for place in case.writes:
        wide[place] = wide[place].clone()
    expected = getattr(REFERENCE, op)(*wide)
    actual = getattr(ops, op)(*packed)
    pairs = (
        list(zip(actual, expected, strict=True))
        if isinstance(actual, tuple)
        else [(actual, expected)]
    )
    pairs += [(packed[place], wide[place]) for place in case.writes]
    for found, wanted in pairs:
        if not OpTable.OPS[op].fp32 and len(case.args) < 4:
            first = next(a for a in case.args if isinstance(a, Tensor) and a.is_floating_point())
            assert found.dtype == first.dtype, f"dtype {found.dtype}, not {first.dtype}"
        if not wanted.is_floating_point():
            assert found.dtype == wanted.dtype, f"dtype {found.dtype}, not {wanted.dtype}"
            assert found.tolist() == wanted.tolist(), f"{found.tolist()}, not {wanted.tolist()}"
        elif case.poisoned:
            _compare_poisoned(found, wanted, long=case.long or bool(case.pack))
        elif isinstance(case.slack, Tensor):
            _compare_rounded(found, wanted, case.slack)
        else:
            assert_close(found, wanted, long=case.long)
    if not OpTable.OPS[op].may_reuse:
        for before, after in zip(inputs, args, strict=True):
            if isinstance(before, Tensor):
                same = torch.equal(before.nan_to_num(), after.nan_to_num())
                assert same, "it changed one of its inputs"


def _compare_poisoned(found: Tensor, wanted: Tensor, *, long: bool) -> None:
    """Finite values agree, and what is not finite in the reference is not finite here."""
    finite = wanted.isfinite()
    host = found.detach().cpu()
    assert torch.equal(host.isfinite(), finite), "NaN or infinities do not propagate alike"
    assert_close(host[finite], wanted[finite], long=long)


def _compare_rounded(found: Tensor, wanted: Tensor, slack: Tensor) -> None:
    """Within what rounding the activations to bytes may cost."""
    host = found.detach().cpu().float()
    bound = slack + 2e-2 * wanted.abs() + 2e-3
    assert host.shape == wanted.shape, f"shape {tuple(host.shape)}, not {tuple(wanted.shape)}"
    assert bool(((host - wanted).abs() <= bound).all()), (
        f"off by {float(((host - wanted).abs() - bound).max()):.3g} beyond rounding"
    )


def _moved(value: Any, device: torch.device) -> Any:
    """A copy on the device with the same strides and the same values in the gaps."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if value.is_contiguous():
        return value.to(device)
    count = value.untyped_storage().nbytes() // value.itemsize
    whole = value.as_strided((count,), (1,), 0).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _wide(value: Any) -> Any:
    """As fp32; quantised weights stay what they are."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, QuantizedWeight):
        return value
    return torch.float32 if isinstance(value, torch.dtype) else value
