"""The check of pooled vectors passes where steps have any shape, where they are padded, and where a
whole step is compiled."""

from __future__ import annotations

import pytest

from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject

PADDED = (
    "platform=cpu",
    *("attention=sdpa", "graph=eager", "limits.mixed_steps=false", "limits.drafts=false"),
    *("limits.max_prefill_rows=2", "shapes=grid", "shapes.decode_seqs=[8]"),
    *("shapes.prefill_seqs=[2]", "shapes.prefill_queries=[16,256]", "shapes.columns=[8]"),
)
CASES = {
    "cpu": (("platform=cpu",), ("pooling",)),
    "padded": (PADDED, ("pooling/test_vectors", "pooling/test_prefix_hits[mean]")),
    "openvino": (
        ("platform=openvino",),
        ("pooling/test_vectors[mean]", "pooling/test_chunks[last]"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_check_passes(name: str) -> None:
    overrides, only = CASES[name]
    if name == "openvino":
        pytest.importorskip("openvino")
    subject = Subject(overrides)
    try:
        report = run(subject, only=only, quiet=True)
    finally:
        subject.close()
    outcomes = {case.id: case.outcome for check in report.checks for case in check.cases}
    assert outcomes and set(outcomes.values()) == {"pass"}, [c.message for c in report.failed]
