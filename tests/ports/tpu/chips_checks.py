"""Two chips, simulated by XLA on the host: JAX has one number of devices in a process."""

from __future__ import annotations

import pytest
from tests.ports.openvino.running import STEPS
from tests.ports.openvino.running import running as plainly
from tests.ports.openvino.test_program import REFERENCE, differ
from tests.ports.tpu.running import running

from vllm_di.errors import ConfigError

TWO = ("model=tiny", "model.dtype=float32", "device.chips=2")


def check_two_chips_give_the_logits_of_one_rank() -> None:
    """Attention by heads on each chip, the cache and the weights cut, collectives by XLA."""
    with plainly(*REFERENCE, *TWO[:2]) as one:
        want = [one.feed(step) for step in STEPS]
    for more in ((), ("attention=sdpa",), ("attention=sdpa", "kv_layout=hnd")):
        with running(*TWO, *more) as two:
            given = two.tpu.arrays
            assert differ([two.feed(step) for step in STEPS], want) < 1e-5
            assert all(array.is_deleted() for array in given)
            for array in two.tpu.arrays:
                shards = array.addressable_shards
                assert len(shards) == 2 and 2 * shards[0].data.size == array.size
            cut = [c for c in two.tpu.constants.values() if not c.is_fully_replicated]
            assert len(cut) > 8
            text = "".join(compiled.as_text() for compiled in two.tpu.compiled)
            assert "all-gather" in text or "all-reduce" in text


def check_heads_that_chips_cannot_share_are_refused() -> None:
    three = [*TWO[:2], "device.chips=3"]
    message = r"device.chips 3: .*(2 kv heads cannot be shared evenly|JAX has 2 devices)"
    with pytest.raises(ConfigError, match=message), running(*three):
        pass
