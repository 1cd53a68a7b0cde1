"""Building, handing in, closing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from tests.containers import fakes
from tests.containers.fakes import CLOSED, assembly, node, stand_in

from vllm_di.components.interfaces import Placement
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import GIVEN, SLOTS, WorkerContainer, slots
from vllm_di.errors import ConfigError


def objects(*left_out: str) -> dict[str, Any]:
    """A stand-in for every worker slot but those named, and the given values."""
    kinds = slots(WorkerContainer)
    return {s: stand_in(k) for s, k in kinds.items() if s not in left_out} | {
        "placement": Placement()
    }


def test_singletons_share_what_they_need() -> None:
    nodes = assembly(shapes=node(fakes.GoodShapes, size=2))
    with opened(WorkerContainer, nodes, **objects("shapes")) as container:
        assert container.shapes() is container.shapes()
        shapes = container.shapes()
        assert isinstance(shapes, fakes.GoodShapes)
        assert shapes.device is container.device()


def test_all_are_closed_in_reverse_even_when_one_raises() -> None:
    CLOSED.clear()
    stubborn = node(fakes.FakeDevice, stubborn=True)
    nodes = assembly(shapes=node(fakes.GoodShapes, size=2), device=stubborn)
    with (
        pytest.raises(RuntimeError, match="cannot close"),
        opened(WorkerContainer, nodes, **objects("shapes", "device")),
    ):
        pass
    assert CLOSED == ["shapes", "device"]


def test_closing_lets_go_of_the_components_at_once() -> None:
    nodes = assembly(device=node(fakes.FakeDevice), shapes=node(fakes.GoodShapes, size=2))
    gc.disable()  # which would free them too, some time later
    try:
        with opened(WorkerContainer, nodes, **objects("shapes", "device")) as container:
            held: list[weakref.ref[Any]] = [
                weakref.ref(container.shapes()),
                weakref.ref(container.device()),
            ]
            assert all(ref() is not None for ref in held)
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def test_a_failing_constructor_closes_what_was_built() -> None:
    CLOSED.clear()
    nodes = assembly(device=node(fakes.FakeDevice), shapes=node(fakes.FailingShapes))
    with (
        pytest.raises(ConfigError, match=r"conf/shapes/fake.yaml:2: shapes: no such size"),
        opened(WorkerContainer, nodes, **objects("shapes", "device")),
    ):
        pytest.fail("the container must not open")
    assert CLOSED == ["device"]


def test_an_object_of_the_wrong_kind_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="attention: Stranger does not implement AttentionBackend"),
        opened(WorkerContainer, assembly(), **objects() | {"attention": fakes.Stranger()}),
    ):
        pass


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with (
        pytest.raises(ConfigError, match="no slot 'atention'; did you mean 'attention'"),
        opened(WorkerContainer, assembly(), **objects(), atention=1),
    ):
        pass


def test_given_values_are_required() -> None:
    rest = objects("shapes")
    del rest["placement"]
    with (
        pytest.raises(ConfigError, match="opening WorkerContainer needs placement"),
        opened(WorkerContainer, assembly(shapes=node(fakes.NeedsPlacement)), **rest),
    ):
        pass


def test_only_builds_one_slot_and_its_needs() -> None:
    CLOSED.clear()
    nodes = assembly(shapes=node(fakes.GoodShapes, size=2), device=node(fakes.FakeDevice))
    kept = objects("shapes", "device")
    with opened(WorkerContainer, nodes, only=["device"], **kept) as container:
        assert isinstance(container.device(), fakes.FakeDevice)
    assert CLOSED == ["device"]


def test_slot_names_are_unique_over_the_containers() -> None:
    assert len(SLOTS) == sum(len(slots(c)) for c in GIVEN)
