"""The layout: what is written comes back, wherever its blocks lie."""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import KvLayout
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.kv_layout.nhd import NhdLayout
from vllm_di.components.messages import KvSpec
from vllm_di.errors import ConfigError
from vllm_di.ports.openvino.kv_layout import OpenVinoLayout
from vllm_di.ports.tpu.kv_layout import TpuLayout

SPECS = [KvSpec(layer=0, num_kv_heads=2, head_size=8), KvSpec(layer=1, num_kv_heads=1, head_size=6)]


def host() -> HostDevice:
    return HostDevice(threads=2, memory_budget=None, default_dtype="float32")


def layout(dtype: str = "auto", block_size: int = 4) -> HndLayout:
    return HndLayout(host(), block_size=block_size, dtype=dtype)


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


@pytest.mark.parametrize(
    ("on", "gathers"),
    [
        (layout(), True),
        (OpenVinoLayout(host(), dtype="float32"), True),
        (OpenVinoLayout(host(), dtype="uint8"), False),
        (TpuLayout(host(), block_size=4), True),
        (NhdLayout(host(), block_size=4, dtype="auto"), True),
    ],
    ids=["hnd", "openvino", "openvino_u8", "tpu", "nhd"],
)
def test_a_layout_gathers_blocks_as_it_declares(on: KvLayout, gathers: bool) -> None:
    assert on.gathers_blocks == gathers
    cache = on.allocate(SPECS[:1], 5, torch.float32)[0]
    table = torch.tensor([[3, 1], [4, 4]])
    if not gathers:
        with pytest.raises(NotImplementedError, match="has no gather_blocks"):
            on.gather_blocks(cache, table)
        return
    size = on.block_size
    k, v = torch.randn(3 * size, 2, 8), torch.randn(3 * size, 2, 8)
    slots = [block * size + i for block in (3, 1, 4) for i in range(size)]
    on.write(cache, k, v, torch.tensor(slots))
    found = on.gather_blocks(cache, table)
    for one, (row, blocks) in itertools.product(range(2), enumerate(table)):
        assert torch.equal(found[one][row], on.gather(cache, blocks, 2 * size)[one])
    assert torch.equal(found[0][0], k[: 2 * size])


def test_slots_below_zero_are_dropped() -> None:
    on = layout()
    cache = on.allocate(SPECS, 2, torch.float32)[0]
    on.write(cache, torch.ones(2, 2, 8), torch.ones(2, 2, 8), torch.tensor([-1, -1]))
    assert not cache.key.any()


def test_a_dtype_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="float7"):
        layout("float7")
