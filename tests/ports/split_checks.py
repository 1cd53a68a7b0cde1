"""Prompts on a simulated NPU: torch gives a simulated device one name in a process."""

from __future__ import annotations

from tests.ports.test_split import tokens


def check_blocks_of_128_tokens_there_and_of_32_here() -> None:
    """In bf16."""
    found = tokens("platform=split_ascend_cpu", "prefill.device.simulated=true")
    assert found == tokens("platform=cpu", "model.dtype=bfloat16")
