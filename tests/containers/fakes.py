"""Small components and an assembly for the tests of the containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import msgspec

from vllm_di.components.interfaces import (
    DEFAULT_ROLE,
    BatchPlan,
    Device,
    DeviceMemory,
    Placement,
    PlanShape,
    SchedulerLimits,
    ShapePolicy,
)
from vllm_di.components.messages import LimitsReport
from vllm_di.containers.assembly import Assembly, Choice
from vllm_di.containers.origins import Origin
from vllm_di.containers.slots import EngineContainer, ServerContainer, WorkerContainer, slots
from vllm_di.errors import ConfigError

CLOSED: list[str] = []


class Port(msgspec.Struct, frozen=True):
    number: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 1
    name: str | None = None


class GoodShapes(ShapePolicy):
    def __init__(
        self,
        device: Device,
        *,
        size: Annotated[int, msgspec.Meta(ge=1, le=64)],
        mode: Literal["a", "b"] = "a",
        scale: float = 1.0,
    ) -> None:
        self.device, self.size, self.mode, self.scale = device, size, mode, scale

    def pad(self, plan: BatchPlan) -> BatchPlan:
        return plan

    def close(self) -> None:
        CLOSED.append("shapes")


class StructShapes(ShapePolicy):
    def __init__(self, *, config: Port) -> None:
        self.config = config

    def pad(self, plan: BatchPlan) -> BatchPlan:
        return plan


class WarmShapes(ShapePolicy):
    def pad(self, plan: BatchPlan) -> BatchPlan:
        return plan

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        yield blank(largest)


class CompositeShapes(ShapePolicy):
    def __init__(self, *, inner: ShapePolicy | Literal["none"]) -> None:
        self.inner = inner

    def pad(self, plan: BatchPlan) -> BatchPlan:
        return plan


class HalfShapes(ShapePolicy):
    def __init__(self) -> None: ...


class Stranger:
    def __init__(self) -> None: ...


class CircularShapes(GoodShapes):
    def __init__(self, device: Device, limits: SchedulerLimits) -> None: ...


class CircularLimits(SchedulerLimits):
    def __init__(self, shapes: ShapePolicy) -> None: ...

    def report(self) -> LimitsReport:
        return LimitsReport()


class FailingShapes(GoodShapes):
    def __init__(self, device: Device) -> None:
        raise ConfigError("no such size")


class NeedsPlacement(GoodShapes):
    def __init__(self, placement: Placement) -> None: ...


class WrongProcess(GoodShapes):
    def __init__(self, tokenizer: object) -> None: ...


class Greedy(GoodShapes):
    def __init__(self, **anything: object) -> None: ...


class FakeDevice(Device):
    def __init__(self, *, fail: bool = False, stubborn: bool = False) -> None:
        self.stubborn = stubborn
        if fail:
            raise RuntimeError("the driver is not there")

    def memory(self) -> DeviceMemory:
        return DeviceMemory(1, 1)

    def synchronize(self) -> None: ...

    def close(self) -> None:
        CLOSED.append("device")
        if self.stubborn:
            raise RuntimeError("cannot close")


def node(cls: type, **keys: Any) -> dict[str, Any]:
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", **keys}


def assembly(**nodes: dict[str, Any]) -> Assembly:
    """An assembly whose worker nodes are ``nodes``; everything else is left out."""
    origins = {}
    for slot, keys in nodes.items():
        for line, key in enumerate(keys, 2):
            origins[f"{slot}.{key}"] = Origin("default", f"conf/{slot}/fake.yaml", line)
    choice = Choice("fake", Origin("default", "conf/config.yaml", 3))
    return Assembly(
        server={s: {} for s in slots(ServerContainer)},
        engine={s: {} for s in slots(EngineContainer)},
        workers={DEFAULT_ROLE: [{s: nodes.get(s, {}) for s in slots(WorkerContainer)}]},
        settings={"trust": []},
        origins=origins,
        choices=dict.fromkeys(nodes, choice),
        packages=["vllm_di", "tests"],
    )


def stand_in(kind: type) -> Any:
    """An object of any interface whose methods all return None."""
    methods = {m: lambda self, *a, **k: None for m in getattr(kind, "__abstractmethods__", ())}
    return type(f"StandIn{kind.__name__}", (kind,), methods)()
