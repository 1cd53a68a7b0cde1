"""Inputs for every op: at least 64 cases each, of 0 and 1 rows, odd sizes, views, NaN and
infinities."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_di.components.quantized import by_channel, by_group
from vllm_di.models.rope import cos_sin_table

ROWS = (0, 1, 2, 3, 7, 17)
WIDTHS = (1, 2, 8, 30, 64, 97, 128, 200)
"""Of rows that are normalised or gated."""
WIDE = 70_001
"""Outputs: more than 16 bits count, and no multiple of any tile."""
FAR = (0, 300, 301, 2047, 2048, 5000, 100_000)
"""Positions. In bf16, 301 and 5,000 round to other numbers; some tables end at 2,048."""
POISON = (float("nan"), float("inf"), float("-inf"))


class OpCase(NamedTuple):
    """One call, with tensors on the host."""

    label: str
    args: tuple[Any, ...]
    pack: str = ""
    """The method through which the second argument goes first."""
    long: bool = False
    """Whether many terms are summed."""
    poisoned: bool = False
    """Whether it holds NaN or infinities."""
    slack: float | Tensor = 0.0
    """Error that is allowed beyond the tolerance, where the interface allows rounding."""
    writes: tuple[int, ...] = ()
    """Places of the arguments that it writes into, which are results too."""


class Maker:
    """Random tensors of one dtype, from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def real(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        wide = torch.randn(shape, dtype=torch.float32, generator=self._generator)
        return wide.to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float32, generator=self._generator)

    def whole(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, dtype=dtype)

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)

    def view(self, *shape: int) -> Tensor:
        """Rows of a wider tensor: stride 1 in the last dimension, NaN in the gaps between rows."""
        return with_gaps(self.real(*shape))


def with_gaps(x: Tensor) -> Tensor:
    """The same numbers in rows of a wider tensor, with NaN between them: a kernel that reads beyond
    its own rows returns NaN."""
    *rest, last = x.shape
    wide = torch.full((*rest, last + 3), float("nan"), dtype=x.dtype)
    wide[..., 1 : last + 1] = x
    return wide[..., 1 : last + 1]


def heads_with_gaps(x: Tensor) -> Tensor:
    """[tokens, heads, head_size], with NaN between tokens: q, k and v are views of one GEMM too."""
    viewed: Tensor = with_gaps(x.flatten(1)).unflatten(1, x.shape[1:])
    return viewed


Cases = Callable[[Maker], Iterator[OpCase]]
MAKERS: dict[str, Cases] = {}
"""Op to the function below that makes its cases. ``write_kv`` and ``paged_attention`` have checks
of their own (kv, prefill, decode)."""


def cases_of(*ops: str) -> Callable[[Cases], Cases]:
    """Registers the decorated function for these ops."""

    def register(make: Cases) -> Cases:
        MAKERS.update(dict.fromkeys(ops, make))
        return make

    return register


def cases(op: str, dtype: torch.dtype, seed: int) -> Iterator[OpCase]:
    """All cases of one op."""
    return MAKERS[op](Maker(dtype, seed))


@cases_of("rms_norm")
def rms_norm(make: Maker) -> Iterator[OpCase]:
    for rows, width, viewed in itertools.product(ROWS, WIDTHS, (False, True)):
        x = make.view(rows, width) if viewed else make.real(rows, width)
        eps = 1e-5 if rows % 2 else 1e-2
        yield OpCase(f"{rows}x{width} view={viewed}", (x, make.real(width), eps))
    # small rows, where eps decides
    for width in WIDTHS:
        yield OpCase(f"small {width}", (make.real(2, width) * 1e-3, make.real(width), 1e-5))
    for poison in POISON:
        x = make.real(3, 64)
        x[1, 5] = poison
        yield OpCase(f"{poison}", (x, make.real(64), 1e-5), poisoned=True)


@cases_of("add_rms_norm")
def add_rms_norm(make: Maker) -> Iterator[OpCase]:
    for case in rms_norm(make):
        x, weight, eps = case.args
        residual = make.real(*x.shape) if x.is_contiguous() else make.view(*x.shape)
        yield case._replace(args=(x, residual, weight, eps))


@cases_of("rotary_embedding")
def rotary_embedding(make: Maker) -> Iterator[OpCase]:
    sizes = ((16, 16), (64, 64), (64, 32), (80, 80), (128, 128), (30, 20))
    shapes = itertools.product((0, 1, 5), sizes, ((4, 4), (6, 2)), (False, True))
    for tokens, (head, rotary), (heads, kv_heads), interleaved in shapes:
        table = _table(rotary, 40)
        q, k = make.real(tokens, heads, head), make.real(tokens, kv_heads, head)
        if viewed := tokens > 1:
            q, k = heads_with_gaps(q), heads_with_gaps(k)
        label = f"{tokens}x{heads}/{kv_heads}x{head} rotary={rotary} interleaved={interleaved}"
        label += f" view={viewed}"
        yield OpCase(label, (make.whole(40, tokens), q, k, table, interleaved))
    positions = torch.tensor(FAR, dtype=torch.int64)
    for interleaved in (False, True):
        q, k = (heads_with_gaps(make.real(len(FAR), heads, 64)) for heads in (4, 2))
        args = (positions, q, k, _far_table(), interleaved)
        yield OpCase(f"positions up to {FAR[-1]} interleaved={interleaved}", args)


def _table(rotary_dim: int, num_positions: int) -> Tensor:
    return cos_sin_table(
        theta=10000.0,
        scaling=None,
        rotary_dim=rotary_dim,
        num_positions=num_positions,
        max_position_embeddings=num_positions,
    )


@functools.cache
def _far_table() -> Tensor:
    return _table(64, FAR[-1] + 1)


@cases_of("fused_qk_norm_rope")
def fused_qk_norm_rope(make: Maker) -> Iterator[OpCase]:
    """Heads of 64 and 128 are those that vendors' kernels have. Weights are small: what is rounded
    between norm and rotation may cancel out there, and then shows."""
    sizes = ((16, 16), (64, 64), (64, 32), (128, 128), (30, 20))
    shapes = itertools.product((0, 1, 5), sizes, ((4, 4), (6, 2)), (False, True))
    for tokens, (size, rotary), (heads, kv_heads), interleaved in shapes:
        table = _table(rotary, 40)
        qkv = make.real(tokens, (heads + 2 * kv_heads) * size)
        if viewed := tokens > 1:
            qkv = with_gaps(qkv)
        weights, eps = _small(make, size), 1e-5 if heads == kv_heads else 1e-2
        args = (make.whole(40, tokens), qkv, heads, kv_heads, *weights, eps, table, interleaved)
        label = f"{tokens}x{heads}/{kv_heads}x{size} rotary={rotary} interleaved={interleaved}"
        yield OpCase(f"{label} view={viewed}", args, long=True)
    weights = _small(make, 64)
    for interleaved in (False, True):
        qkv, positions = make.view(len(FAR), 8 * 64), torch.tensor(FAR, dtype=torch.int64)
        args = (positions, qkv, 4, 2, *weights, 1e-5, _far_table(), interleaved)
        yield OpCase(f"positions up to {FAR[-1]} interleaved={interleaved}", args, long=True)
    for poison in POISON:
        qkv = make.real(3, 8 * 64)
        qkv[1, 70] = poison  # in the second query head
        args = (make.whole(40, 3), qkv, 4, 2, *weights, 1e-5, _far_table(), False)
        yield OpCase(f"{poison}", args, long=True, poisoned=True)


def _small(make: Maker, size: int) -> tuple[Tensor, Tensor]:
    """Weights of the queries' norm and of the keys'."""
    return make.real(size) / 4, make.real(size) / 4


@cases_of("rotary_write_kv")
def rotary_write_kv(make: Maker) -> Iterator[OpCase]:
    blocks, block_size = 4, 3
    for case in rotary_embedding(make):
        positions, q, k, table, interleaved = case.args
        tokens, heads, size = k.shape
        slots = make.shuffled(blocks * block_size)[:tokens]
        if tokens > 1:
            slots[1] = -1
        caches = [make.real(blocks, heads, block_size, size) for _ in "kv"]
        v = make.real(*k.shape)
        v = v if k.is_contiguous() else heads_with_gaps(v)
        args = (positions, q, k, v, table, interleaved, *caches, slots)
        yield case._replace(args=args, writes=(6, 7))


@cases_of("silu_and_mul", "gelu_tanh_and_mul")
def silu_and_mul(make: Maker) -> Iterator[OpCase]:
    for rows, width, viewed in itertools.product(ROWS, WIDTHS, (False, True)):
        x = make.view(rows, 2 * width) if viewed else make.real(rows, 2 * width)
        yield OpCase(f"{rows}x{2 * width} view={viewed}", (x.mul_(3),))
    x = make.real(3, 64)
    x[1, 5] = x[1, 40] = float("nan")
    yield OpCase("nan", (x,), poisoned=True)


@cases_of("linear")
def linear(make: Maker) -> Iterator[OpCase]:
    sizes = ((1, 1), (8, 5), (33, 17), (64, 64), (200, 96), (96, 130))
    for rows, (inputs, outputs), biased in itertools.product(ROWS, sizes, (False, True)):
        bias = make.real(outputs) if biased else None
        x = make.view(rows, inputs) if rows % 2 else make.real(rows, inputs)
        weight = make.real(outputs, inputs) / inputs**0.5
        args = (x, weight, bias)
        label = f"{rows}x{inputs}->{outputs} bias={biased} view={rows % 2 == 1}"
        yield OpCase(label, args, "pack_linear", inputs > 64)
    for rows, (inputs, outputs) in itertools.product((1, 4), sizes):
        wide = (make.real(rows, inputs), make.real(outputs, inputs), None, torch.float32)
        yield OpCase(f"{rows}x{inputs}->{outputs} wide", wide, "pack_linear", True)
    for rows, dtype in itertools.product((1, 3), (None, torch.float32)):
        large = (make.real(rows, 8), make.real(WIDE, 8), make.real(WIDE), dtype)
        yield OpCase(f"{rows}x8->{WIDE} to {dtype}", large, "pack_linear", True)
    for poison in POISON:
        x = make.real(3, 64)
        x[1, 5] = poison
        args = (x, make.real(8, 64), None)
        yield OpCase(f"{poison}", args, "pack_linear", poisoned=True)


@cases_of("gated_linear")
def gated_linear(make: Maker) -> Iterator[OpCase]:
    sizes = ((8, 5), (33, 17), (64, 64), (96, 33))
    for rows, (inputs, width), biased, act in itertools.product(
        ROWS, sizes, (False, True), ("silu", "gelu_tanh")
    ):
        bias = make.real(2 * width) if biased else None
        weight = make.real(2 * width, inputs) / inputs**0.5
        x = make.view(rows, inputs) if rows % 2 else make.real(rows, inputs)
        args = (x, weight, bias, act)
        label = f"{rows}x{inputs}->{width} bias={biased} {act} view={rows % 2 == 1}"
        yield OpCase(label, args, "pack_gated_linear", True)
    args = (make.real(3, 8), make.real(2 * WIDE, 8) / 8**0.5, None, "silu")
    yield OpCase(f"3x8->{WIDE} silu", args, "pack_gated_linear", True)


def _rounding(x: Tensor, dense: Tensor) -> Tensor:
    """Bound of the error from rounding x to signed bytes in x @ dense.T: half a step of each
    input."""
    peak = x.float().abs().amax(-1, keepdim=True) if len(x) else x.float()[:, :1]
    return peak / 254 * dense.abs().sum(1)


@cases_of("quantized_linear")
def quantized_linear(make: Maker) -> Iterator[OpCase]:
    sizes = ((32, 1), (64, 16), (96, 33), (256, 24))
    for rows, (inputs, outputs), kind, biased in itertools.product(
        ROWS, sizes, ("int8", "group8", "group4"), (False, True)
    ):
        dense = make.real(outputs, inputs, dtype=torch.float32)
        weight = by_channel(dense) if kind == "int8" else by_group(dense, int(kind[-1]))
        x = make.view(rows, inputs) if rows % 2 else make.real(rows, inputs)
        bias = make.real(outputs) if biased else None
        slack = _rounding(x, weight.dequantize(torch.float32))
        label = f"{rows}x{inputs}->{outputs} {kind} bias={biased} view={rows % 2 == 1}"
        yield OpCase(label, (x, weight, bias), "pack_quantized", True, slack=slack)
    dense = make.real(WIDE, 32, dtype=torch.float32)
    for rows, kind in ((1, "int8"), (3, "int8"), (3, "group4")):
        weight = by_channel(dense) if kind == "int8" else by_group(dense, int(kind[-1]))
        x = make.real(rows, 32)
        slack = _rounding(x, weight.dequantize(torch.float32))
        args = (x, weight, make.real(WIDE))
        yield OpCase(f"{rows}x32->{WIDE} {kind}", args, "pack_quantized", True, slack=slack)


@cases_of("gated_quantized_linear")
def gated_quantized_linear(make: Maker) -> Iterator[OpCase]:
    sizes = ((32, 2), (64, 16), (96, 33))
    for rows, (inputs, width), kind, act in itertools.product(
        ROWS, sizes, ("int8", "group4"), ("silu", "gelu_tanh")
    ):
        dense = make.real(2 * width, inputs, dtype=torch.float32) / inputs**0.5
        weight = by_channel(dense) if kind == "int8" else by_group(dense, int(kind[-1]))
        x = make.view(rows, inputs) if rows % 2 else make.real(rows, inputs)
        wide = weight.dequantize(torch.float32)
        off, y = _rounding(x, wide), x.float() @ wide.T
        gate, up = y.abs().chunk(2, -1)
        off_gate, off_up = off.chunk(2, -1)
        # silu and gelu have slopes below 1.2, and stay below what they are given
        slack = 1.2 * off_gate * (up + off_up) + off_up * gate
        label = f"{rows}x{inputs}->{width} {kind} {act} view={rows % 2 == 1}"
        args = (x, weight, None, act)
        yield OpCase(label, args, "pack_gated_quantized", True, slack=slack)


@cases_of("embedding")
def embedding(make: Maker) -> Iterator[OpCase]:
    for tokens, vocab, hidden in itertools.product(ROWS, (1, 5, 99), (1, 30, 64, 97)):
        table = make.view(vocab, hidden) if tokens % 2 else make.real(vocab, hidden)
        label = f"{tokens} of {vocab}x{hidden} view={tokens % 2 == 1}"
        yield OpCase(label, (make.whole(vocab, tokens), table))
    ids = torch.tensor([0, 32_767, 32_768, 65_535, 65_536, WIDE - 1], dtype=torch.int64)
    yield OpCase(f"of {WIDE}x8", (ids, make.real(WIDE, 8)))


@cases_of("fused_experts")
def fused_experts(make: Maker) -> Iterator[OpCase]:
    shapes = itertools.product(ROWS[1:], ((2, 1), (4, 2), (8, 3)), ((16, 24), (64, 40)))
    for (tokens, (experts, k), (hidden, inter)), act in itertools.product(
        shapes, ("silu", "gelu_tanh")
    ):
        x = make.view(tokens, hidden) if tokens % 2 else make.real(tokens, hidden)
        gate_up = make.real(experts, 2 * inter, hidden) / hidden**0.5
        down = make.real(experts, hidden, inter) / inter**0.5
        weights, ids = make.uniform(tokens, experts).topk(k)
        weights = weights / weights.sum(-1, keepdim=True)  # as a router's
        args = (x, gate_up, down, weights, ids, act)
        yield OpCase(
            f"{tokens}x{hidden} {k} of {experts} {act} view={tokens % 2 == 1}", args, long=True
        )
    for hidden in (16, 64, 30, 8):
        gate_up, down = make.real(4, 24, hidden), make.real(4, hidden, 12)
        ids = torch.zeros(3, 1, dtype=torch.int64)
        ones = torch.ones(3, 1, dtype=torch.float32)
        args = (make.real(3, hidden) / 8, gate_up / 8, down / 8, ones, ids, "silu")
        yield OpCase(f"all to one expert, {hidden}", args, long=True)


@cases_of("greedy_sample")
def greedy_sample(make: Maker) -> Iterator[OpCase]:
    for rows, vocab in itertools.product(ROWS[1:], (1, 2, 15, 16, 17, 64, 99, 320, 1000)):
        logits = make.real(rows, vocab, dtype=torch.float32)
        yield OpCase(f"{rows}x{vocab}", (logits,))
        yield OpCase(f"{rows}x{vocab} view=True", (with_gaps(logits),))
        # many equal maxima: the lowest id wins
        yield OpCase(f"{rows}x{vocab} ties", ((logits * 1.5).round(),))
    logits = make.real(6, WIDE, dtype=torch.float32).clamp_(max=3)  # the largest come many times
    for row, at in enumerate((0, 32_767, 32_768, 65_535, 65_536, WIDE - 1)):
        logits[row, at] = 9.0
    yield OpCase(f"{len(logits)}x{WIDE}", (logits,))
    yield OpCase(f"{len(logits)}x{WIDE} ties", (logits.clamp(max=3),))
    for vocab in (1, 17, 64, 320):
        zeros = torch.zeros(2, vocab, dtype=torch.float32)
        yield OpCase(f"all equal {vocab}", (zeros,))
        yield OpCase(f"all -inf {vocab}", (zeros - float("inf"),))
    for value in (float("nan"), float("inf"), -float("inf")):
        for at in (0, 50, 98):
            logits = make.real(3, 99, dtype=torch.float32)
            logits[1, at] = value
            yield OpCase(f"3x99 {value} at {at}", (logits,))


@cases_of("top_k_top_p_sample")
def top_k_top_p_sample(make: Maker) -> Iterator[OpCase]:
    settings = ((0, 1.0, 0.0), (1, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2))
    for vocab, rows, (k, p, least) in itertools.product(
        (2, 16, 99, 320), (1, 3, 8), (*settings, (5, 0.7, 0.1))
    ):
        logits = 2 * make.real(rows, vocab, dtype=torch.float32)
        args = (
            with_gaps(logits) if rows == 3 else logits,
            torch.full((rows,), min(k or vocab, vocab), dtype=torch.int64),
            torch.full((rows,), p, dtype=torch.float32),
            torch.full((rows,), least, dtype=torch.float32),
            make.uniform(rows),
        )
        yield OpCase(f"{rows}x{vocab} k={k} p={p} min_p={least}", args)
    args = (
        make.real(3, WIDE, dtype=torch.float32),
        torch.full((3,), 5, dtype=torch.int64),
        torch.full((3,), 1.0, dtype=torch.float32),
        torch.full((3,), 0.0, dtype=torch.float32),
        make.uniform(3),
    )
    yield OpCase(f"3x{WIDE} k=5", args)
