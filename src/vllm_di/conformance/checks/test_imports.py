"""Importing a port's classes touches no device, network, thread or global state."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from vllm_di.conformance.outcomes import Record
from vllm_di.conformance.subject import Subject

MOST_SECONDS = 2.0
"""Of processor time, torch's own import apart."""


def targets(value: Any) -> list[str]:
    """Every ``_target_`` in a nest of nodes."""
    if not isinstance(value, dict):
        return []
    own = [value["_target_"]] if isinstance(value.get("_target_"), str) else []
    return own + [t for inner in value.values() for t in targets(inner)]


def test_imports_change_nothing(subject: Subject, record: Record) -> None:
    assembly = subject.assembly()
    nodes = {**assembly.engine, **{f"{i}": node for i, node in enumerate(assembly.stages)}}
    names = sorted(set(targets(nodes)))
    done = subprocess.run(
        [sys.executable, "-m", "vllm_di.conformance.hygiene"],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    record.figure(seconds=round(found["seconds"], 2), classes=len(names))
    assert not found["changed"], f"importing changed {'; '.join(found['changed'])}"
    assert not found["network"], f"importing used the network: {found['network']}"
    assert found["seconds"] < MOST_SECONDS, f"importing took {found['seconds']:.1f} s"
