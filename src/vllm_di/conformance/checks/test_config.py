"""The config composes, survives a round trip, and wrong values are refused with their place."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_di.conformance.bad_values import Bad, bad_values, unchecked
from vllm_di.conformance.outcomes import Record
from vllm_di.conformance.subject import Subject
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.schema import check, find_class
from vllm_di.containers.slots import (
    SLOTS,
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)
from vllm_di.errors import ConfigError, PortError

LEAST_BAD = 200
CONTAINERS = (ServerContainer, EngineContainer, WorkerContainer)
GIVEN = {"engine_client", "launcher", "placement", "worker_report"}


def each_node(assembly: Assembly) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """(container, slot, node) of every slot."""
    for container in CONTAINERS:
        for slot in slots(container):
            yield container, slot, assembly.nodes(container)[slot]


def check_slot(container: Any, assembly: Assembly, slot: str) -> None:
    check(container, assembly, only=[slot], replaced=[*(set(SLOTS) - {slot}), *GIVEN])


def test_every_slot_validates(subject: Subject) -> None:
    assembly = subject.assembly()
    for container, slot, _ in each_node(assembly):
        check_slot(container, assembly, slot)


def test_round_trip(subject: Subject) -> None:
    assembly = subject.assembly()
    again = Assembly.decode(assembly.encode())
    assert again == assembly
    assert again.encode() == assembly.encode()


def test_bad_values_are_refused(subject: Subject, record: Record) -> None:
    """At least 200, none accepted, each refused with the key's name."""
    plain, count = subject.assembly(), 0
    accepted, homeless = [], []
    for container, slot, node in each_node(plain):
        cls = find_class(node["_target_"], plain.packages, slot, slot)
        for bad in bad_values(cls, node):
            changed = with_value(plain, container, slot, bad)
            count += 1
            try:
                check_slot(container, changed, slot)
            except ConfigError as error:
                if slot not in str(error):
                    homeless.append(f"{slot}.{bad.key}: {error}")
            else:
                accepted.append(f"{slot}.{bad.key}={bad.value!r}")
    record.figure(values=count)
    assert not accepted, f"accepted: {'; '.join(accepted)}"
    assert not homeless, f"refused without a place: {'; '.join(homeless)}"
    assert count >= LEAST_BAD, f"{count} bad values could be made"


def with_value(plain: Assembly, container: Any, slot: str, bad: Bad) -> Assembly:
    """The assembly with one value changed, or one key removed."""
    changed = copy.deepcopy(plain)
    node = changed.nodes(container)[slot]
    if bad.value is ...:
        del node[bad.key]
    else:
        node[bad.key] = bad.value
    return changed


def test_no_key_takes_just_anything(subject: Subject) -> None:
    plain = subject.assembly()
    loose = []
    for _, slot, node in each_node(plain):
        cls = find_class(node["_target_"], plain.packages, slot, slot)
        loose += [f"{slot}.{key}" for key in unchecked(cls, node)]
    assert not loose, f"without a type: {', '.join(loose)}"


@pytest.mark.parametrize("slot", sorted(SLOTS))
def test_a_wrong_class_is_refused(subject: Subject, slot: str) -> None:
    """A class from outside the project, and a class that fills another slot."""
    plain = subject.assembly()
    container = next(c for c, s, _ in each_node(plain) if s == slot)
    other = next(s for s in slots(container) if SLOTS[s] is not SLOTS[slot])
    for target in ("os.system", "builtins.open", plain.nodes(container)[other]["_target_"]):
        changed = with_value(plain, container, slot, Bad("_target_", target))
        with pytest.raises(ConfigError, match=slot):
            check_slot(container, changed, slot)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scheduler.max_num_seqs=many", "max_num_seqs"),
        ("scheduler.max_nun_seqs=3", "max_num_seqs"),
        ("attention=no_such_attention", "attention"),
        ("atention=sdpa", "attention"),
        ("ops.rms_norm=no_such_library", "rms_norm"),
        ("ops.no_such_op=torch", "no_such_op"),
        ("model.dtype=float31", "float31"),
        ("+device.no_such_key=1", "no_such_key"),
    ],
)
def test_wrong_overrides_are_refused(subject: Subject, override: str, words: str) -> None:
    """On the command line, with the nearest or the known names."""
    with pytest.raises(ConfigError) as error:
        start(subject, override)
    if isinstance(error.value, PortError):  # this key is the device's to judge
        subject.need_driver()
    assert re.search(words, str(error.value)), error.value


def start(subject: Subject, override: str) -> None:
    assembly = subject.assembly(override)
    for container, slot, _ in each_node(assembly):
        check_slot(container, assembly, slot)
    with subject.parts("model", more=[override]):
        pass
