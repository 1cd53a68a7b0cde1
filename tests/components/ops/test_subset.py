"""A library may have any subset of the ops: for each op, one that has it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.components.ops.libraries import random
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import OpLibrary, OpTable
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.conformance.op_cases import MAKERS, cases
from vllm_di.errors import PortError

TINY = ["platform=cpu", "model.dtype=float32", "graph=eager", "attention=paged"]


class Alone(OpLibrary):
    """The base of the libraries below: no op at all."""

    implements: frozenset[str] = frozenset()

    def __init__(self) -> None: ...


def library_of(op: str, calls: list[str]) -> type[Alone]:
    """A library with one method, which notes its calls."""
    method = getattr(TorchOps(), op)

    def run(self: Any, *args: Any) -> Any:
        calls.append(op)
        return method(*args)

    return type(f"Only_{op}", (Alone,), {op: run, "implements": frozenset({op})})


def tokens(*overrides: str) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM("tiny", overrides=[*TINY, *overrides]) as llm:
        return [o.outputs[0].token_ids for o in llm.generate(["a", "hello world"], params)]


@pytest.mark.parametrize("op", OpTable.OPS)
def test_one_op_alone(op: str) -> None:
    """It is built, runs where it is asked for, and the reference runs the rest."""
    calls: list[str] = []
    library = library_of(op, calls)()
    assert set(library.describe()) == {op}
    auto, chosen = SelectedOps(library), SelectedOps(TorchOps(), **{op: library})
    assert set(auto.describe()) == set(OpTable.OPS)
    for other in MAKERS:
        case = next(c for c in cases(other, torch.float32, 3) if len(c.args[0]))
        for table in (auto, chosen):
            args = [a.clone() if isinstance(a, torch.Tensor) else a for a in case.args]
            expected = getattr(TorchOps(), other)(*case.args)
            if case.pack:
                args[1] = getattr(table, case.pack)(args[1])
            torch.testing.assert_close(getattr(table, other)(*args), expected)
    if op in MAKERS and op not in OpTable.OPS.fused:
        assert calls.count(op) >= 2
    elif op in MAKERS:  # alone it never runs in place of its members, unless it was chosen
        assert op not in auto.fusions
        assert op in chosen.fusions
        assert calls.count(op) == 1


@pytest.mark.parametrize("op", OpTable.OPS)
def test_what_it_lacks_says_so(op: str) -> None:
    if "_absent" not in getattr(OpTable, op).__code__.co_names:  # its declaration has a body
        return
    with pytest.raises(NotImplementedError, match=f"Alone has no {op}"):
        getattr(Alone(), op)(*([None] * 9)[: getattr(TorchOps, op).__code__.co_argcount - 1])


def test_an_op_that_is_named_and_missing_is_an_error() -> None:
    class Boastful(Alone):
        implements = frozenset({"linear"})

    with pytest.raises(PortError, match=r"ops\.linear: Boastful names it in `implements`"):
        SelectedOps(Boastful())


class Forgetful(TorchOps):
    """Names one of its two ops."""

    implements = frozenset({"rms_norm"})

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, eps)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        raise AssertionError


class Silent(Forgetful):
    """Names none."""

    implements = frozenset()


@pytest.mark.parametrize("name", ["Forgetful", "Silent"])
def test_a_method_that_is_not_named_is_an_error(name: str) -> None:
    target = f"ops.library._target_={__name__}.{name}"
    with pytest.raises(PortError, match=rf"ops: .*{name} has a method \w+, and its `implements`"):
        tokens("trust=[tests]", "ops=torch", target)
    with pytest.raises(PortError, match="silu_and_mul"):
        SelectedOps(TorchOps(), silu_and_mul=Forgetful())


class NormsAlone(Alone):
    """Named by an override: neither attention nor a cache write nor a product."""

    implements = frozenset({"rms_norm"})

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return TorchOps().rms_norm(x, weight, eps)


class CacheAlone(Alone):
    implements = frozenset({"write_kv"})

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        TorchOps().write_kv(k, v, key_cache, value_cache, slot_mapping)


@pytest.mark.parametrize("name", ["Alone", "NormsAlone", "CacheAlone"])
def test_an_engine_runs_on_what_is_there(name: str) -> None:
    target = f"ops.library._target_={__name__}.{name}"
    assert tokens("trust=[tests]", "ops=torch", target) == tokens("ops=torch")


def test_the_table_still_packs_for_the_library_that_multiplies() -> None:
    calls: list[str] = []
    table = SelectedOps(library_of("linear", calls)())
    weight = random(4, 8)
    assert table.pack_linear(weight) is weight
    ops: OpTable = table
    ops.linear(random(2, 8), weight)
    assert calls == ["linear"]
