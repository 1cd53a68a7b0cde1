"""Every slot resolves, can be overridden on the command line, and the override is what runs."""

from __future__ import annotations

import pytest

from vllm_di.conformance import probes
from vllm_di.conformance.driving import ask, run, tokens
from vllm_di.conformance.golden import goldens, prompts
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.containers.fill import opened
from vllm_di.containers.schema import check, taken
from vllm_di.containers.slots import (
    GIVEN,
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)


def test_every_slot_meets_its_interface(subject: Subject) -> None:
    assembly = subject.assembly()
    for container, given in GIVEN.items():
        check(container, assembly, replaced=given)
    with subject.parts() as worker:
        for slot, kind in slots(WorkerContainer).items():
            assert isinstance(worker.providers[slot](), kind), slot


def override(subject: Subject, slot: str, kind: str, stage: int = 0) -> list[str]:
    """What a user would write to put the probe of the chosen class into its slot, in one stage."""
    key, found = keys(subject, slot)[stage], []
    choice = subject.assembly().choices.get(key)
    given = any(text.startswith(f"{key}=") for text in subject.overrides)
    if choice and slot == "model_runner" and not given:
        found.append(f"{key}={choice.option}")
    return [*found, f"{key}._target_={probes.name_of(kind, subject.target(slot, stage))}"]


def keys(subject: Subject, slot: str) -> list[str]:
    """The slot's node; of a worker's slot, that of each stage."""
    return [f"{s}{slot}" for s in subject.stages] if slot in slots(WorkerContainer) else [slot]


@pytest.mark.parametrize("slot", [*slots(EngineContainer), *slots(WorkerContainer)])
def test_an_override_runs(subject: Subject, slot: str, record: Record) -> None:
    """The part is called, in a step or while a program is traced: in each stage."""
    plan = check(EngineContainer, subject.assembly(), replaced=GIVEN[EngineContainer])
    if slot in plan.parts and slot not in {"engine", *taken(plan.parts)}:
        raise NotDeclared("no component of its engine takes one")
    counts = {}
    for stage, key in enumerate(keys(subject, slot)):
        if slot == "sampler" and stage < len(subject.stages) - 1:
            continue  # tokens are drawn where the last layers are
        probes.CALLS.clear()
        more = override(subject, slot, "Counting", stage)
        place = subject.assembly(*more).place(f"{key}._target_")
        assert place.startswith("command line"), "not the last word"
        with subject.engine(*more) as engine:
            run(engine, [ask(prompts(1)[0], 3)])
        counts[key] = probes.CALLS[slot]
    record.figure(**counts)
    unused = [key for key, calls in counts.items() if not calls]
    assert not unused, f"overridden, and the override was never called: {', '.join(unused)}"


@pytest.mark.parametrize("slot", [s for s in slots(ServerContainer) if s != "server"])
def test_a_server_override_is_built(subject: Subject, slot: str) -> None:
    assembly = subject.assembly(*override(subject, slot, "Counting"))
    with opened(ServerContainer, assembly, only=[slot]) as server:
        assert type(server.providers[slot]()).__name__.startswith("Counting")


def test_sdpa_is_honoured(subject: Subject) -> None:
    """The reference attention in place of the platform's: the same tokens, from that class."""
    dtype = subject.exact_dtype
    wanted = goldens("gqa", subject.head_size, 4, 8)
    more = ("attention=sdpa", f"model.dtype={dtype}")
    for worker in subject.assembly(*more).stages:
        chosen = worker["attention"]["_target_"]
        assert chosen.endswith(".SdpaAttention"), f"attention=sdpa gave {chosen}"
    with subject.engine(*more) as engine:
        found = run(engine, [ask(prompt, 8) for prompt in prompts(4)])
    if dtype == "float32":
        assert tokens(found) == tokens(wanted)


def test_same_config_same_hash(subject: Subject) -> None:
    again = Subject(subject.overrides, config_dirs=subject.config_dirs)
    try:
        assert again.config_hash == subject.config_hash
        longest = subject.assembly().stages[0]["model"]["max_model_len"]
        other = subject.assembly(f"model.max_model_len={100 if longest != 100 else 101}")
        assert subject.hash_of(other) != subject.config_hash
    finally:
        again.close()
