"""Cases of every kernel but attention: those of the conformance suite, then real models' sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.compare import Found, compare, tolerance
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.ops.triton import TritonOps
from vllm_di.conformance import op_cases

REFERENCE = TorchOps()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 20261124
ALWAYS_FP32 = ("greedy_sample", "top_k_top_p_sample")


class Table:
    """The library under test on a device, one for each number of programs."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @functools.cache  # noqa: B019 - a table lives as long as its process
    def of(self, programs: int | None) -> TritonOps:
        """None: as many as the device wants; the host wants one."""
        if self.device.type == "cpu":
            programs = programs or 1
        return TritonOps(programs=programs, num_stages=None)

    @property
    def ops(self) -> TritonOps:
        return self.of(1)


@dataclass(frozen=True)
class Case:
    """One call, and what it must give."""

    label: str
    judge: Callable[[Table], list[Found]]


def of_suite(op: str, dtype: torch.dtype) -> Iterator[Case]:
    """The conformance suite's: 0 and 1 rows, odd sizes, views with NaN in their gaps, NaN and
    infinities, 70,001 outputs, far positions."""
    name = str(dtype).removeprefix("torch.")
    for case in op_cases.cases(op, dtype, SEED):
        judge = functools.partial(_judge_suite, op, case)
        yield Case(f"{name} {case.label}", judge)


def _judge_suite(op: str, case: op_cases.OpCase, table: Table) -> list[Found]:
    args = [there(a, table.device) for a in case.args]
    if case.pack:
        args[1] = getattr(table.ops, case.pack)(args[1])
    wide = [_wide(a) for a in case.args]
    for place in case.writes:
        wide[place] = wide[place].clone()
    want = getattr(REFERENCE, op)(*wide)
    got = getattr(table.ops, op)(*args)
    pairs = [*zip(got, want, strict=True)] if isinstance(got, tuple) else [(got, want)]
    pairs += [(args[place], wide[place]) for place in case.writes]
    long = case.long or (case.poisoned and bool(case.pack))
    return [compare(a, b, *tolerance(a.dtype, long=long)) for a, b in pairs]


def there(value: Any, device: torch.device) -> Any:
    """On the device, with the strides that it has here and what lies in the gaps."""
    if not isinstance(value, Tensor):
        return value
    if value.is_contiguous():
        return value.to(device)
    count = value.untyped_storage().nbytes() // value.itemsize
    whole = value.as_strided((count,), (1,), 0).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) else value


# ------------------------------------------------------------------------------------------------
# the sizes of real models, made on the device


class Maker:
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(SEED)

    def real(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(
            shape, dtype=torch.float32, device=self.device, generator=self._generator
        )
        return made.to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self._generator)

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self._generator)

    def qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one product, as the model has them: 32 heads, 8 kv heads of 128."""
        parts = self.real(tokens, 6144).split([4096, 1024, 1024], -1)
        q, k, v = (part.unflatten(1, (-1, 128)) for part in parts)
        return q, k, v

    def angles(self) -> Tensor:
        turns = self.real(8192, 64, dtype=torch.float32)
        return torch.cat([turns.cos(), turns.sin()], -1)

    def caches(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values [blocks, 8, 32, 128], slots of which every seventh is none."""
        blocks = tokens // 32 + 3
        slots = torch.randperm(blocks * 32, device=self.device)[:tokens]
        slots[::7] = -1
        return self.real(blocks, 8, 32, 128), self.real(blocks, 8, 32, 128), slots


def of_models(op: str, dtype: torch.dtype) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    for tokens in (1, 64, 16384):
        yield Case(f"{name} llama {tokens}", functools.partial(LARGE[op], tokens, dtype))


def _norm(tokens: int, dtype: torch.dtype, table: Table) -> list[Found]:
    make = Maker(dtype, table.device)
    x, weight = make.real(tokens, 4096), make.real(4096)
    heads = make.qkv(min(tokens, 64))[0]
    pairs = [(x, weight), (heads, weight[:128])]
    return [
        _near(table.ops.rms_norm(a, w, 1e-5), REFERENCE.rms_norm(a.float(), w.float(), 1e-5))
        for a, w in pairs
    ]


def _add_norm(tokens: int, dtype: torch.dtype, table: Table) -> list[Found]:
    make = Maker(dtype, table.device)
    x, residual, weight = make.real(tokens, 4096), make.real(tokens, 4096), make.real(4096)
    total = x + residual
    want = REFERENCE.rms_norm(total.float(), weight.float(), 1e-5)
    got, stream = table.ops.add_rms_norm(x, residual, weight, 1e-5)
    return [_near(got, want), compare(stream, total, 0.0, 0.0)]


def _rotary(tokens: int, dtype: torch.dtype, table: Table) -> list[Found]:
    make = Maker(dtype, table.device)
    q, k, _ = make.qkv(tokens)
    positions, angles = make.whole(8192, tokens), make.angles()
    want = REFERENCE.rotary_embedding(positions, q.float(), k.float(), angles, False)
    got = table.ops.rotary_embedding(positions, q, k, angles, False)
    return [_near(a, b) for a, b in zip(got, want, strict=True)]


def _rotary_write(tokens: int, dtype: torch.dtype, table: Table) -> list[Found]:
    make = Maker(dtype, table.device)
    q, k, v = make.qkv(tokens)
    positions, angles = make.whole(8192, tokens), make.angles()
    keys, values, slots = make.caches(tokens)
    want_keys, want_values = keys.float(), values.float()
    want_q, want_k = REFERENCE.rotary_embedding(positions, q.float(), k.float(), angles, False)
    REFERENCE.write_kv(want_k, v.float(), want_keys, want_values, slots)
    got = table.ops.rotary_write_kv(positions, q, k, v, angles, False, keys, values, slots)
    exact = compare(values, want_values, 0.0, 0.0)
    return [_near(got, want_q), _near(keys, want_keys), exact]


def _gate(name: str, tokens: int, dtype: torch.dtype, table: Table) -> list[Found]:
    x = Maker(dtype, table.device).real(tokens, 28672)
    extreme = torch.tensor([[-1e4, 1e4, 0.0, -0.0, 1.0, 1.0, 1.0, 1.0]], device=table.device)
    pairs = [(x, x.float()), (extreme.to(dtype), extreme.to(dtype).float())]
    return [_near(getattr(table.ops, name)(a), getattr(REFERENCE, name)(b)) for a, b in pairs]


def _write(tokens: int, dtype: torch.dtype, table: Table) -> list[Found]:
    """Bit for bit, also into a cache of another dtype and with odd sizes."""
    make = Maker(dtype, table.device)
    _, k, v = make.qkv(tokens)
    odd = make.real(tokens, 48)[:, :36].unflatten(1, (3, 12)), make.real(tokens, 3, 12)
    found = []
    for cache_dtype in (dtype, torch.float16):
        for (one, two), shape in (((k, v), (8, 32, 128)), (odd, (3, 7, 12))):
            blocks = tokens // shape[1] + 3
            keys, values = (make.real(blocks, *shape, dtype=cache_dtype) for _ in range(2))
            slots = torch.randperm(blocks * shape[1], device=table.device)[:tokens]
            slots[1::7] = -1
            want = keys.clone(), values.clone()
            REFERENCE.write_kv(one, two, *want, slots)
            table.ops.write_kv(one, two, keys, values, slots)
            found += [compare(keys, want[0], 0.0, 0.0), compare(values, want[1], 0.0, 0.0)]
    return found


def _linear(tokens: int, dtype: torch.dtype, table: Table) -> list[Found]:
    make = Maker(dtype, table.device)
    x, weight = make.real(tokens, 4096), make.real(6144, 4096) / 64
    want = torch.mm(x.double(), weight.double().t()).float()
    got = table.ops.linear(x, weight)
    wide = table.ops.linear(x, weight, None, torch.float32)
    # an fp32 sum of products of ``dtype``: the suite's bound for wide results of narrow inputs
    relative, absolute = tolerance(torch.float32, long=True)
    return [_near(got, want, long=True), compare(wide, want, relative, absolute)]


def _greedy(rows: int, _dtype: torch.dtype, table: Table) -> list[Found]:
    logits = Maker(torch.float32, table.device).real(min(rows, 256), 128256)
    logits[:, 100_000] = logits[:, 77] = 99.0
    logits[1::3, 128255] = float("nan")
    return [compare(table.ops.greedy_sample(logits), REFERENCE.greedy_sample(logits), 0.0, 0.0)]


def _sample(rows: int, _dtype: torch.dtype, table: Table) -> list[Found]:
    """A draw must lie where its uniform number points, in the distribution as it is in fp64. A
    share of 1e-4 of it is left to roundings: tokens in another order of summing."""
    make = Maker(torch.float32, table.device)
    rows = min(rows, 256)
    logits = make.real(rows, 128256) * 3
    logits[:, 5:25] = logits[:, 5:6]  # ties
    logits -= logits.amax(-1, keepdim=True)
    kinds = torch.arange(rows, device=table.device)
    top_k = torch.tensor([128256, 1, 10, 40, 1000], device=table.device)[kinds % 5]
    top_p = torch.tensor([1.0, 0.9, 0.5, 0.05], device=table.device)[kinds % 4]
    min_p = torch.tensor([0.0, 0.1, 0.0], device=table.device)[kinds % 3]
    uniform = make.uniform(rows)
    drawn = table.ops.top_k_top_p_sample(logits.clone(), top_k, top_p, min_p, uniform)
    return [compare(*_outside(drawn, logits, top_k, top_p, min_p, uniform), 0.0, 1e-4)]


def _outside(
    drawn: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """How far the number of each row lies outside of its token's share; what it may: zero."""
    ranked, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    least = ranked.gather(-1, (top_k.clamp(1, logits.shape[-1]) - 1)[:, None])
    probs = ranked.masked_fill(ranked < least, float("-inf")).softmax(-1)
    before = probs.cumsum(-1) - probs
    keep = (before < top_p.double()[:, None]) & (probs >= min_p[:, None] * probs[:, :1])
    keep[:, 0] = True
    mass = (probs * keep).cumsum(-1)
    place = (ids == drawn[:, None]).int().argmax(-1, keepdim=True)
    high = mass.gather(-1, place)[:, 0] / mass[:, -1]
    low = high - (probs.gather(-1, place)[:, 0] / mass[:, -1])
    number = uniform.double()
    off = torch.maximum(low - number, number - high).clamp_min(0.0)
    return off, torch.zeros_like(off)


def _near(got: Tensor, want: Tensor, *, long: bool = False) -> Found:
    return compare(got, want, *tolerance(got.dtype, long=long))


LARGE: dict[str, Callable[[int, torch.dtype, Table], list[Found]]] = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "rotary_embedding": _rotary,
    "rotary_write_kv": _rotary_write,
    "silu_and_mul": functools.partial(_gate, "silu_and_mul"),
    "gelu_tanh_and_mul": functools.partial(_gate, "gelu_tanh_and_mul"),
    "write_kv": _write,
    "linear": _linear,
    "greedy_sample": _greedy,
    "top_k_top_p_sample": _sample,
}


def cases(op: str) -> Iterator[Case]:
    for dtype in DTYPES:
        if dtype is not torch.float32 and op in ALWAYS_FP32:
            continue
        if op in op_cases.MAKERS:
            yield from of_suite(op, dtype)
        yield from of_models(op, dtype)
