"""The Triton kernels executed on the host's CPU by Intel's OpenCL runtime, against the reference.

``make test-opencl`` runs it in the environment of ``make xpu-env``: the tests that elsewhere run in
Triton's interpreter, attention in fewer shapes, as each takes the compiler seconds. What a test
finds stands in the report that ``ARGS=--junitxml=FILE`` asks for, as ``largest_difference``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.components.ops import libraries
from tests.components.ops.libraries import random
from tests.kernels.triton import interpreted
from tests.kernels.triton.interpreted import (  # noqa: F401 - they are run here
    DTYPES,
    MIXED,
    REFERENCE,
    There,
    attend,
    some_dtypes,
    test_add_rms_norm_works_in_place,
    test_gates,
    test_greedy_takes_the_lowest_id_and_none_of_a_row_that_is_not_finite,
    test_rms_norm,
    test_rms_norm_of_heads_inside_a_product,
    test_rotary,
    test_sampling_draws_what_the_reference_draws,
    test_sampling_over_several_blocks,
    test_write_kv_changes_the_addressed_slots_alone,
)
from tests.ports.xpu import opencl
from torch import Tensor

from vllm_di.kernels.triton import tiles
from vllm_di.kernels.triton.tiles import Tiling

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")  # of lanes in loops
SMALL = Tiling(num_stages=1, key_bytes=512, middle_warps=8, large_warps=16, token_warps=8)
"""16 keys a pass: Intel's compiler for the CPU takes a second for it, and 30 for 64 keys."""


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.setitem(tiles.TILINGS, "small", SMALL)
    monkeypatch.setattr(interpreted, "TRITON", there())
    differences = [0.0]

    def close(got: Tensor, exact: Tensor, scale: float = 1.0) -> None:
        if got.numel():
            difference = (got.double() - exact.double()).abs()
            differences.append(float(difference[difference.isfinite()].max()))
        libraries.close(got, exact, scale)

    monkeypatch.setattr(interpreted, "close", close)
    yield
    request.node.user_properties.append(("largest_difference", max(differences)))


def there(programs: int = 1, architecture: str = "small") -> There:
    return There(programs, architecture, opencl.launch)


def test_it_is_intels_runtime_on_the_cpu() -> None:
    assert opencl.device_name().startswith("Intel(R) OpenCL on ")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 12])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [*((dtype, None) for dtype in DTYPES), *((dtype, torch.float16) for dtype in DTYPES[:2])],
)
def test_rotary_and_write_in_one(
    interleaved: bool, rotary: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    interpreted.test_rotary_and_write_in_one(dtype, interleaved, rotary, cache_dtype)


def test_bf16_keys_reach_a_cache_of_fp16_without_a_rounding_between() -> None:
    """Intel's Triton compiles with fast mathematics, and leaves out the rounding to bf16: these
    keys are nearer to the exact ones than if they were rotated and written one after the other."""
    q, k, v = (random(5, heads, 16, dtype=torch.bfloat16, seed=heads) for heads in (6, 2, 2))
    positions, table = torch.tensor([3, 0, 8, 1, 2]), random(9, 16, seed=3)
    caches = [torch.zeros(4, 2, 8, 16, dtype=torch.float16) for _ in range(2)]
    want = caches[0].clone(), caches[1].clone()
    slots = torch.tensor([31, -1, 0, 7, 9])
    exact = REFERENCE.rotary_embedding(positions, q.float(), k.float(), table, False)[1]
    REFERENCE.write_kv(exact, v, *want, slots)
    interpreted.TRITON.rotary_write_kv(positions, q, k, v, table, False, *caches, slots)
    assert torch.equal(caches[1], want[1])
    assert torch.allclose(caches[0], want[0], rtol=2**-10, atol=1e-6)
    assert not torch.equal(caches[0], want[0].bfloat16().half())


@some_dtypes
@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "split"])
def test_attention_of_decodes(programs: int, dtype: torch.dtype) -> None:
    attend(there(programs), [(1, 1), (1, 40), (1, 400)], dtype=dtype)


@some_dtypes
def test_attention_of_mixed_batches(dtype: torch.dtype) -> None:
    attend(there(), MIXED, dtype=dtype)


@pytest.mark.parametrize(("window", "soft_cap"), [(5, None), (None, 2.0), (100, 30.0)])
def test_attention_windows_and_soft_caps(window: int | None, soft_cap: float | None) -> None:
    attend(there(), [(1, 300), (5, 40)], window=window, soft_cap=soft_cap)


@pytest.mark.parametrize(("heads", "size"), [((2, 1), 64), ((7, 1), 24), ((8, 8), 16)])
def test_attention_of_whole_prompts(heads: tuple[int, int], size: int) -> None:
    attend(there(), [(70, 70), (33, 33)], heads=heads, size=size)


def test_attention_padding_rows_are_zero() -> None:
    attend(there(1000), [(1, 300), (1, 2)], padding=6)


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_experts(tokens: int) -> None:
    interpreted.test_experts(torch.float32, 4, 2, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bmg", "sm_90", "gfx1100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention_in_the_tiles_of_gpus(architecture: str, dtype: torch.dtype) -> None:
    """Tiles of a decode, of a chunk and of a prompt."""
    ops = there(architecture=architecture)
    for sequences in ([(1, 150), (1, 40)], [(7, 90)], [(130, 130)]):
        attend(ops, sequences, heads=(4, 1), dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [[(1, 150), (1, 40)], [(130, 130)]])
def test_attention_of_a_common_head_size(sequences: list[tuple[int, int]]) -> None:
    attend(there(architecture="bmg"), sequences, heads=(4, 1), size=64)
