"""Start and stop, repeatedly and in the middle of a start: nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch

from vllm_di.components.executor.inline import start_alone
from vllm_di.components.interfaces import Placement
from vllm_di.conformance import probes
from vllm_di.conformance.driving import ask, run, tokens
from vllm_di.conformance.footprint import footprint, resident, settled
from vllm_di.conformance.golden import prompts
from vllm_di.conformance.outcomes import Record
from vllm_di.conformance.subject import Subject
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.fill import Launcher, open_worker, opened
from vllm_di.containers.slots import EngineContainer, WorkerContainer, slots
from vllm_di.errors import PortError

CYCLES, WARM = 50, 25
LEAK_PER_CYCLE = 320 * 1024
"""Resident bytes. Growth by this much in each cycle is a leak: an allocator's caches grow less."""
DEVICE_BYTES = 2**20
STEPS = {
    "worker.load": ("worker", "FailingLoad"),
    "worker.allocate": ("worker", "FailingAllocate"),
    "model_runner.warm_up": ("model_runner", "FailingWarmup"),
}


def test_fifty_cycles(subject: Subject, record: Record) -> None:
    """Threads, files, children, shared memory and device memory come back to where they were."""
    asks = [ask(prompt, 4) for prompt in prompts(2)]
    first: list[list[int]] = []
    base, free, rss = footprint(), 0, 0
    for cycle in range(CYCLES):
        if cycle == WARM:
            base, rss = footprint(), resident()
            free = device_free(subject)
        with subject.engine() as engine:
            found = tokens(run(engine, asks))
        assert found == (first := first or found), f"cycle {cycle} gave other tokens"
    more = settled(base)
    assert not more, f"left behind after {CYCLES - WARM} cycles: {'; '.join(more)}"
    grown = (resident() - rss) // (CYCLES - WARM)
    lost = free - device_free(subject)
    record.figure(cycles=CYCLES, bytes_per_cycle=grown)
    assert grown < LEAK_PER_CYCLE, f"{grown} resident bytes more with each cycle"
    assert lost < DEVICE_BYTES, f"{lost} bytes of device memory are gone"


def device_free(subject: Subject) -> int:
    """Free device memory; a host's is everybody's and tells nothing, as no report does."""
    with subject.parts("device") as container:
        device = container.device()
        memory = device.memory()
        return 0 if device.on_host or memory is None else memory.free


def with_probes(plain: Assembly, failing: str, kind: str) -> Assembly:
    """Every worker slot tracked, one of them failing."""
    changed = copy.deepcopy(plain)
    for slot, node in changed.stages[0].items():
        node["_target_"] = probes.name_of(kind if slot == failing else "Tracked", node["_target_"])
    return changed


def warm(subject: Subject) -> None:
    """One whole start before the first failed one: thread pools that libraries keep for good exist
    afterwards."""

    def start() -> None:
        with subject.engine() as engine:
            run(engine, [ask(prompts(1)[0], 2)])

    subject.once("lifecycle: a whole start", start)


def load_and_allocate(assembly: Assembly) -> None:
    with open_worker(assembly, Placement()) as worker:
        start_alone(worker)


@pytest.mark.parametrize("failing", [*slots(WorkerContainer), *STEPS])
def test_a_failed_start_is_undone(subject: Subject, failing: str) -> None:
    """Whatever was built is closed, in reverse, and the injected error comes out."""
    slot, kind = STEPS.get(failing, (failing, "Failing"))
    changed = with_probes(subject.assembly(), slot, kind)
    threads = torch.get_num_threads()
    other = threads - 1 or 2  # a number that nothing before this has left behind
    try:
        torch.set_num_threads(other)
        warm(subject)
        probes.BUILT.clear()
        probes.CLOSED.clear()
        base = footprint()
        torch.set_num_threads(other)
        with pytest.raises((probes.Injected, PortError), match=slot) as failed:
            load_and_allocate(changed)
        restored = torch.get_num_threads() == other
    finally:
        torch.set_num_threads(threads)
    cause = failed.value if failed.type is probes.Injected else failed.value.__cause__
    assert isinstance(cause, probes.Injected), failed.value
    assert list(reversed(probes.CLOSED)) == probes.BUILT, (
        f"built {', '.join(probes.BUILT)}; closed {', '.join(probes.CLOSED)}"
    )
    assert restored, "torch's number of threads was not restored"
    more = settled(base)
    assert not more, f"left behind: {'; '.join(more)}"


def test_a_failed_engine_start_is_undone(subject: Subject) -> None:
    """A worker that cannot load: the engine's own parts are closed too."""
    changed = with_probes(subject.assembly(), "worker", "FailingLoad")
    for slot in ("executor", "kv_cache_manager", "scheduler", "engine"):
        node = changed.engine[slot]
        node["_target_"] = probes.name_of("Tracked", node["_target_"])
    warm(subject)
    probes.BUILT.clear()
    probes.CLOSED.clear()
    base = footprint()
    with (
        pytest.raises(probes.Injected),
        opened(EngineContainer, changed, launcher=Launcher(changed)),
    ):
        pass
    assert set(probes.BUILT) == set(probes.CLOSED)  # some twice, which is allowed
    more = settled(base)
    assert not more, f"left behind: {'; '.join(more)}"


def test_close_may_be_called_twice(subject: Subject) -> None:
    with subject.parts() as container:
        parts = [container.providers[slot]() for slot in slots(WorkerContainer)]
        for part in parts:
            getattr(part, "close", lambda: None)()
