"""The memory and dtypes that the device reports."""

from __future__ import annotations

import gc
import re

import pytest
import torch

from vllm_di.components.executor.inline import start_alone
from vllm_di.components.interfaces import Device
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.errors import ConfigError

MIB = 2**20
SIZE = 64 * MIB
BUDGET = 1024 * MIB


def free(device: Device) -> int:
    device.synchronize()
    report = device.memory()
    assert report is not None, "a memory report that comes and goes"
    return report.free


@pytest.mark.parametrize("budget", [False, True], ids=["whole", "budget"])
def test_memory_falls_and_recovers(subject: Subject, record: Record, budget: bool) -> None:
    """Free memory falls by at least 90 % of 64 MiB, and comes back. A host's free memory changes
    with other processes: there the declared budget is checked instead."""
    if budget and not subject.has_key("device.memory_budget"):
        raise NotDeclared("the device has no memory_budget")
    more = [f"device.memory_budget={BUDGET}"] if budget else []
    with subject.parts("device", more=more) as container:
        device = container.device()
        report = device.memory()
        if report is None:
            raise NotDeclared("the device has no memory report")
        assert report.total >= report.free >= 0, report
        record.figure(total=report.total)
        if budget:
            assert report.total == BUDGET, f"total {report.total}, not the budget of {BUDGET}"
        elif device.on_host:
            return
        fallen = back = 0
        for _ in range(3):  # a host's own allocator may give other pages back in between
            before = free(device)
            taken = device.zeros((SIZE,), torch.uint8)
            taken.fill_(1)
            low = free(device)
            del taken
            gc.collect()
            fallen, back = before - low, free(device) - low
            if 0.9 * SIZE <= fallen <= 1.5 * SIZE and back >= 0.9 * SIZE:
                break
        assert 0.9 * SIZE <= fallen <= 1.5 * SIZE, f"64 MiB taken, free fell by {fallen} bytes"
        assert back >= 0.9 * SIZE, f"64 MiB given back, free rose by {back} bytes"


def test_a_cache_beyond_the_memory_is_refused(subject: Subject) -> None:
    """At the start, with both sizes in the error. The scheduler's limits stay: shapes may be made
    for them."""
    budget = subject.has_key("device.memory_budget")
    more = [f"device.memory_budget={BUDGET}"] if budget else []
    more += [f"worker.num_blocks={2**40}", "worker.kv_cache_memory=null"]
    with subject.parts("device") as container:
        if container.device().memory() is None:
            raise NotDeclared("the device has no memory report")
    with subject.parts("worker", more=[*more, "model.max_model_len=256"]) as container:
        with pytest.raises(ConfigError) as error:
            start_alone(container.worker())
        assert len(re.findall(r"\d", str(error.value))) > 3, f"no figures: {error.value}"


def test_dtypes(subject: Subject, record: Record) -> None:
    """Declared dtypes work; a dtype that the device lacks is an error, never a cast."""
    with subject.parts("device") as container:
        device = container.device()
        supported = {str(d).removeprefix("torch.") for d in device.supported_dtypes}
        lacking = set(subject.declared.dtypes) - supported
        assert not lacking, f"declared, but the device lacks {', '.join(sorted(lacking))}"
        assert device.default_dtype in device.supported_dtypes
        assert device.dtype("auto") == device.default_dtype
        for name in supported:
            x = device.zeros((3, 5), device.dtype(name))
            assert x.dtype == getattr(torch, name), f"asked for {name}, got {x.dtype}"
            assert x.device.type == device.torch_device.type
            assert not x.any()
        for name in ("float64", "complex64", "flaot32"):
            if name not in supported:
                with pytest.raises(ConfigError, match=name):
                    device.dtype(name)
