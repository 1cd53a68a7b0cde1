from __future__ import annotations

import inspect

import msgspec

from vllm_di.components.limits.standard import StandardLimits
from vllm_di.components.messages import LimitsReport


def test_each_key_is_a_field_of_the_report() -> None:
    fields = [field.name for field in msgspec.structs.fields(LimitsReport)]
    assert list(inspect.signature(StandardLimits).parameters) == fields


def test_what_is_given_is_reported() -> None:
    values = {
        "mixed_steps": False,
        "chunked_prefill": False,
        "max_prefill_rows": 3,
        "max_batch_context": 5000,
        "null_block": True,
        "drafts": False,
    }
    assert msgspec.structs.asdict(StandardLimits(**values).report()) == values  # type: ignore[arg-type]
