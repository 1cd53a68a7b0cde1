"""A class in another form than its interface declares is an error at the start, in every slot."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import BatchPlan, KvLayout, LayerCache, Worker
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.messages import KvSpec, StepPlan, StepResult
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import open_engine
from vllm_di.containers.forms import misfit
from vllm_di.containers.slots import SLOTS
from vllm_di.errors import ConfigError

RECORDS = Path(__file__).resolve().parents[2] / "docs/interfaces"
TINY = ["platform=cpu", "model=tiny", "model.dtype=float32", "ops=torch", "trust=[tests]"]
INTERFACES = {kind.__name__: kind for kind in SLOTS.values()}


def entries(version: str) -> dict[str, dict[str, str]]:
    content: dict[str, dict[str, dict[str, str]]] = json.loads(
        (RECORDS / f"{version}.json").read_text()
    )
    return content["entries"]


def changed() -> Iterator[tuple[str, str]]:
    """-> (method, its form in 1.1), where 2.0 takes other parameters."""
    now = {key: entry["form"].removeprefix("@remote ") for key, entry in entries("2.0").items()}
    for key, entry in entries("1.1").items():
        is_method = entry["kind"] == "method" and key.split(".")[0] in INTERFACES and key in now
        if is_method and entry["form"].split(" -> ")[0] != now[key].split(" -> ")[0]:
            yield key, entry["form"]


def written(kind: type, method: str, form: str) -> type:
    """A class of another package that writes one method in a form."""
    namespace: dict[str, Any] = {}
    exec(f"from __future__ import annotations\ndef {method}{form}: ...", namespace)
    return type("Mine", (kind,), {method: namespace[method], "__module__": "mine"})


OLD = {key: form for key, form in changed() if key != "GraphPolicy.wrap"}  # tried by its result


@pytest.mark.parametrize("key", OLD)
def test_each_form_of_1_1_that_changed(key: str) -> None:
    name, _, method = key.partition(".")
    told = misfit(written(INTERFACES[name], method, OLD[key]), INTERFACES[name])
    assert told is not None
    assert told.startswith(f"Mine.{method} takes (")
    assert f"but it is called as {key}(" in told


def test_these_are_all_the_slots_that_changed() -> None:
    changed = {"KvCacheManager", "Model", "ModelProgram", "ModelRunner", "Worker"}
    assert {key.split(".")[0] for key in OLD} == changed


@pytest.mark.parametrize("name", INTERFACES)
def test_the_declared_forms_fit(name: str) -> None:
    kind = INTERFACES[name]
    for key, entry in entries("2.0").items():
        owner, _, method = key.partition(".")
        form = entry["form"].removeprefix("@remote ")
        if owner == name and entry["kind"] == "method" and not form.startswith("@property"):
            assert misfit(written(kind, method, form), kind) is None, key


class More(Worker):
    """With parameters of its own, a wider type, and nothing written that is declared a property."""

    def load(self, again: bool = False): ...  # type: ignore[no-untyped-def]
    def execute(self, step: object) -> StepResult: ...  # type: ignore[empty-body]


class OldPlan(Worker):
    def execute(self, step: StepPlan) -> StepResult: ...  # type: ignore[empty-body, override]


class Attribute(Worker):
    execute = None  # type: ignore[assignment]


def test_what_else_fits_or_not() -> None:
    assert misfit(More, Worker) is None
    assert "Attribute.execute is no method" in str(misfit(Attribute, Worker))
    assert "OldPlan.execute takes (step)" in str(misfit(OldPlan, Worker))


# -- what only a trial shows ---------------------------------------------------------------------


class OldWrap(EagerGraph):
    """As in 1.x."""

    def wrap(self, forward: Any) -> Any:
        def run(
            token_ids: Tensor, positions: Tensor, caches: Any, metadata: Any, hidden: Any
        ) -> Any:
            return forward(token_ids, positions, caches, metadata, hidden)

        return run


class NoWrap(EagerGraph):
    def wrap(self, forward: Any) -> Any:
        return None


class OldPlace(EagerGraph):
    """As in 1.x."""

    def place(self, plan: BatchPlan) -> Any:
        return plan, None


class PlanAlone(EagerGraph):
    def place(self, plan: BatchPlan) -> Any:
        return plan


class OldCache(HndLayout):
    """As in 1.x."""

    def allocate(
        self, specs: Sequence[KvSpec], num_blocks: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        shape = (num_blocks, specs[0].num_kv_heads, self.block_size, specs[0].head_size)
        make: Callable[..., Any] = LayerCache
        return [make(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))]


class Short(HndLayout):
    def gather(self, cache: LayerCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        k, v = super().gather(cache, blocks, length)
        return k[:, :-1], v


TRIED: dict[type, str] = {
    OldWrap: "OldWrap.wrap gives a function of (token_ids, positions, caches, ",
    NoWrap: "NoWrap.wrap gives a NoneType; a step is called with one ModelStep",
    OldPlace: "place gives (BatchPlan, NoneType), and not a BatchPlan with a sequence",
    PlanAlone: "place gives ",
    OldCache: "fails on a small input: TypeError: LayerCache.__init__() takes 2 positional",
    Short: "Short gives keys of shape [1, 1, ",
}


@pytest.mark.parametrize("cls", TRIED)
def test_tried_at_the_start(cls: type, tmp_path: Path) -> None:
    slot = "kv_layout" if issubclass(cls, KvLayout) else "graph"
    (tmp_path / slot).mkdir()
    keys = "block_size: 32\ndtype: auto\n" if slot == "kv_layout" else ""
    text = f"# Mine.\n_target_: {__name__}.{cls.__qualname__}\n{keys}"
    (tmp_path / slot / "mine.yaml").write_text(text)
    assembly = assemble([*TINY, f"{slot}=mine"], [tmp_path])
    with pytest.raises(ConfigError) as caught, open_engine(assembly):
        logging.error("it started")
    assert str(caught.value).startswith(f"{tmp_path}/{slot}/mine.yaml:2: {slot}: ")
    assert TRIED[cls] in str(caught.value)
