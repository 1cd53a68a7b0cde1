"""Every capability of the manifest is read by a check that judges it."""

from __future__ import annotations

import pytest

from vllm_di.conformance.capabilities import readers
from vllm_di.containers.manifest import Capabilities

JUDGES = {
    "dtypes": {"device", "ops", "golden"},
    "kv_dtypes": {"cache"},
    "head_sizes": {"prefill", "decode"},
    "block_sizes": {"kv"},
    "graphs": {"graphs"},
    "tensor_parallel": {"communicator", "faults"},
    "quantization": {"ops", "weights"},
    "sliding_window": {"prefill", "decode", "golden"},
    "soft_cap": {"prefill", "decode"},
    "batch_invariant": {"batching"},
    "clears_block_tail": {"kv"},
    "static_shapes": {"graphs"},
    "ops": {"manifest"},
}


@pytest.mark.parametrize("capability", Capabilities.__struct_fields__)
def test_its_judges_read_it(capability: str) -> None:
    assert JUDGES[capability] <= set(readers(capability))


def test_one_that_nobody_reads_is_seen() -> None:
    assert not readers("teleportation")
