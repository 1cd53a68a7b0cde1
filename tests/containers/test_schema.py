"""What may fill a slot, and how the errors read."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.containers import fakes
from tests.containers.fakes import assembly, node
from typing_extensions import deprecated

from vllm_di.components.interfaces import ShapePolicy
from vllm_di.containers.assembly import assemble
from vllm_di.containers.schema import Plan, check
from vllm_di.containers.slots import GIVEN, EngineContainer, WorkerContainer, slots
from vllm_di.errors import ConfigError


def checked(**nodes: dict[str, Any]) -> Plan:
    others = [s for s in slots(WorkerContainer) if s not in nodes]
    return check(WorkerContainer, assembly(**nodes), replaced=others)


def test_values_and_injection() -> None:
    plan = checked(shapes=node(fakes.GoodShapes, size=3, scale=2))
    part = plan.parts["shapes"]
    assert part.cls is fakes.GoodShapes
    assert part.injected == ["device"]
    assert part.values == {"size": 3, "scale": 2.0}


def test_a_struct_named_config_takes_the_keys() -> None:
    part = checked(shapes=node(fakes.StructShapes, number=7)).parts["shapes"]
    assert part.values == {"config": fakes.Port(number=7)}


def test_a_nested_node_is_a_component() -> None:
    inner = node(fakes.StructShapes)
    part = checked(shapes=node(fakes.CompositeShapes, inner=inner)).parts["shapes"]
    assert part.parts["inner"].cls is fakes.StructShapes
    plain = checked(shapes=node(fakes.CompositeShapes, inner="none")).parts["shapes"]
    assert plain.values == {"inner": "none"}


def test_order_follows_needs() -> None:
    plan = checked(shapes=node(fakes.GoodShapes, size=1), device=node(fakes.FakeDevice))
    assert plan.order == ["device", "shapes"]


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            {"shapes": node(fakes.GoodShapes, sise=3)},
            ["conf/shapes/fake.yaml:2", "shapes.size", "GoodShapes needs this key"],
        ),
        (
            {"shapes": node(fakes.GoodShapes, size=3, mod="a")},
            ["conf/shapes/fake.yaml:4", "shapes.mod", "did you mean 'mode'?"],
        ),
        (
            {"shapes": node(fakes.GoodShapes, size="big")},
            ["conf/shapes/fake.yaml:3", "shapes.size", "Expected `int`, got `str`", "'big'"],
        ),
        ({"shapes": node(fakes.GoodShapes, size=65)}, ["shapes.size", "<= 64", "65"]),
        ({"shapes": node(fakes.GoodShapes, size=True)}, ["shapes.size", "Expected `int`"]),
        ({"shapes": node(fakes.GoodShapes, size=1, mode="c")}, ["shapes.mode", "'c'"]),
        ({"shapes": node(fakes.StructShapes, number=70000)}, ["shapes.number", "65535", "70000"]),
        ({"shapes": node(fakes.StructShapes, numbr=7)}, ["did you mean 'number'?"]),
        ({"shapes": node(fakes.HalfShapes)}, ["only in part", "lacks pad"]),
        (
            {"shapes": node(fakes.Stranger)},
            ["does not implement ShapePolicy", "lacks pad"],
        ),
        (
            {"shapes": node(fakes.CircularShapes), "limits": node(fakes.CircularLimits)},
            ["circle", "shapes", "limits", "conf/limits/fake.yaml:2"],
        ),
        ({"shapes": node(fakes.WrongProcess)}, ["'tokenizer'", "another process"]),
        ({"shapes": node(fakes.Greedy)}, ["must name what it takes"]),
        (
            {"shapes": node(fakes.GoodShapes, size=node(fakes.StructShapes))},
            ["shapes.size", "a plain value is expected"],
        ),
        ({"shapes": {"_target_": 3}}, ["shapes._target_", "dotted name"]),
        ({"shapes": {"_target_": "tests.containers.fakes.GodShapes"}}, ["'GoodShapes'"]),
        ({"shapes": {"_target_": "tests.containers.nothing.X"}}, ["no module"]),
        (
            {"shapes": {"_target_": "tests.container.fakes.GoodShapes"}},
            ["no module 'tests.container'; did you mean 'tests.containers'?"],
        ),
        (
            {"shapes": {"_target_": "tests.containers.faks.GoodShapes"}},
            ["no module 'tests.containers.faks'; did you mean 'tests.containers.fakes'?"],
        ),
    ],
)
def test_a_wrong_node_is_refused_with_its_place(nodes: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(**nodes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.open",
        "subprocess.Popen",
        "multiprocessing.Process",
        "hydra.utils.instantiate",
        "logging.os.system",
        "antigravity.webbrowser",
        "vllm_di.containers.fill.sys.exit",
        "tests.containers.fakes.msgspec.Struct",
        "vllm_di",
        "",
        "vllm_di..x",
        "__main__.X",
    ],
)
def test_code_of_others_is_refused(target: str) -> None:
    with pytest.raises(ConfigError):
        checked(shapes={"_target_": target})


def test_a_re_exported_class_is_judged_by_its_real_home() -> None:
    with pytest.raises(ConfigError, match="is really dependency_injector"):
        checked(shapes={"_target_": _REAL})


_REAL = "vllm_di.containers.schema.DeclarativeContainer"


@given(st.lists(st.sampled_from(["os", "sys", "torch", "json", "vllm", "di", "x"]), min_size=1))
def test_no_generated_path_imports_anything(parts: list[str]) -> None:
    before = set(sys.modules)
    with pytest.raises(ConfigError):
        checked(shapes={"_target_": ".".join(parts)})
    assert set(sys.modules) == before


def test_a_deprecated_method_is_named_with_what_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = ShapePolicy.warm_up_plans
    checked(shapes=node(fakes.WarmShapes))
    assert caplog.text == ""
    monkeypatch.setattr(ShapePolicy, "warm_up_plans", deprecated("use plans")(plain))
    checked(shapes=node(fakes.GoodShapes, size=1))  # does not implement it
    assert caplog.text == ""
    checked(shapes=node(fakes.WarmShapes))
    message = "conf/shapes/fake.yaml:2: shapes: WarmShapes.warm_up_plans is deprecated: use plans"
    assert message in caplog.text


def test_a_slot_that_nothing_takes_is_refused_where_a_person_chose_it() -> None:
    """By default it is there, and nobody asks for it."""
    tiny = ["platform=cpu", "model=tiny"]
    check(EngineContainer, assemble(tiny), replaced=GIVEN[EngineContainer])
    chosen = assemble([*tiny, "kv_transfer=tcp"])
    with pytest.raises(ConfigError, match=r"^command line: kv_transfer=tcp: kv_transfer: nothing"):
        check(EngineContainer, chosen, replaced=GIVEN[EngineContainer])
    split = assemble(["platform=split_cpu_cpu", "model=tiny", "kv_transfer=tcp"])
    check(EngineContainer, split, replaced=GIVEN[EngineContainer])
