"""The layout: what is written comes back, wherever its blocks lie."""

from __future__ import annotations

import pytest
import torch

from vllm_di.components.device.host import HostDevice
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.messages import KvSpec
from vllm_di.errors import ConfigError

SPECS = [KvSpec(layer=0, num_kv_heads=2, head_size=8), KvSpec(layer=1, num_kv_heads=1, head_size=6)]


def layout(dtype: str = "auto", block_size: int = 4) -> HndLayout:
    device = HostDevice(threads=2, memory_budget=None, default_dtype="float32")
    return HndLayout(device, block_size=block_size, dtype=dtype)


def test_bytes_are_what_is_allocated() -> None:
    for dtype in ("auto", "bfloat16"):
        on = layout(dtype)
        caches = on.allocate(SPECS, 5, torch.float32)
        total = sum(c.key.nbytes + c.value.nbytes for c in caches)
        assert total == 5 * on.bytes_per_block(SPECS, torch.float32)


def test_what_is_written_comes_back() -> None:
    on = layout()
    cache = on.allocate(SPECS, 5, torch.float32)[0]
    k, v = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    table = torch.tensor([3, 1, 99], dtype=torch.int32)
    slots = torch.tensor([12, 13, 14, 15, 4, 5])
    on.write(cache, k, v, slots)
    keys, values = on.gather(cache, table, 6)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    untouched = [0, 2, 4]
    assert not cache.key[untouched].any()


def test_slots_below_zero_are_dropped() -> None:
    on = layout()
    cache = on.allocate(SPECS, 2, torch.float32)[0]
    on.write(cache, torch.ones(2, 2, 8), torch.ones(2, 2, 8), torch.tensor([-1, -1]))
    assert not cache.key.any()


def test_a_dtype_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="float7"):
        layout("float7")
