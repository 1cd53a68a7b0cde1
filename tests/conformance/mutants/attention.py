"""Op libraries whose attention or cache writes are wrong."""

from __future__ import annotations

import torch
from tests.conformance.mutants.ops import Altered as OneOp
from torch import Tensor

from vllm_di.components.ops.torch import attend


class Altered(OneOp):
    """The reference with one step changed by a subclass."""

    def __init_subclass__(cls) -> None:
        cls.implements = frozenset({"paged_attention"})

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        out = torch.zeros_like(q)
        starts = query_start.tolist()
        for row, length in enumerate(seq_lens.tolist()):
            queries = q[starts[row] : starts[row + 1]]
            keys, values = (
                self.rows(cache, block_table, row, length) for cache in (key_cache, value_cache)
            )
            found = self.one(queries, keys, values, scale, window, soft_cap)
            out[starts[row] : starts[row + 1]] = found
        return out

    def rows(self, cache: Tensor, table: Tensor, row: int, length: int) -> Tensor:
        """[kv_heads, length, head_size] of one sequence."""
        blocks = table[row, : -(-length // cache.shape[2])].long()
        return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]

    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        return attend(q, keys, values, scale, window, soft_cap)


class NoMask(Altered):
    """Every query sees all keys."""

    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        rows = [attend(q[i : i + 1], keys, values, scale, window, soft_cap) for i in range(len(q))]
        return torch.cat(rows) if rows else q


class WindowOff(Altered):
    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        wider = None if window is None else window + 1
        return attend(q, keys, values, scale, wider, soft_cap)


class WindowIgnored(Altered):
    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        return attend(q, keys, values, scale, None, soft_cap)


class SoftCapIgnored(Altered):
    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        return attend(q, keys, values, scale, window, None)


class HeadsMixed(Altered):
    """Query head h goes to kv head h % kv_heads."""

    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        times = q.shape[1] // len(keys)
        k, v = keys.repeat(times, 1, 1), values.repeat(times, 1, 1)
        return attend(q, k, v, scale, window, soft_cap)


class ScaleWrong(Altered):
    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        return attend(q, keys, values, scale**2, window, soft_cap)


class DroppedLastKey(Altered):
    """The newest token is not attended to."""

    def one(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        if len(q) == 1 and keys.shape[1] > 1:
            keys, values = keys[:, :-1], values[:, :-1]
        return attend(q, keys, values, scale, window, soft_cap)


class StaleBlock(Altered):
    """A sequence's last block is taken for the one before."""

    def rows(self, cache: Tensor, table: Tensor, row: int, length: int) -> Tensor:
        used = -(-length // cache.shape[2])
        if used > 1:
            table = table.clone()
            table[row, used - 1] = table[row, used - 2]
        return super().rows(cache, table, row, length)


class FirstTable(Altered):
    """Every sequence reads the blocks of the first."""

    def rows(self, cache: Tensor, table: Tensor, row: int, length: int) -> Tensor:
        return super().rows(cache, table[:1].expand_as(table), row, length)


class ReadsBeyond(Altered):
    """Weighs slots behind the last token with 0, so that NaN there shows."""

    def rows(self, cache: Tensor, table: Tensor, row: int, length: int) -> Tensor:
        size = cache.shape[2]
        blocks = table[row, : -(-length // size)].long()
        whole = cache[blocks].transpose(0, 1).flatten(1, 2)
        beyond = whole[:, length:].sum(1, keepdim=True) * 0
        return whole[:, :length] + beyond


class SlotOff(OneOp):
    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().write_kv(k, v, key_cache, value_cache, slot_mapping + 1)


class RoundedValues(OneOp):
    """Values lose bits on their way into the cache."""

    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().write_kv(k, v.bfloat16(), key_cache, value_cache, slot_mapping)


class LastTokenUnwritten(OneOp):
    def write_kv(
        self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if len(k) > 1:
            k, v, slot_mapping = k[:-1], v[:-1], slot_mapping[:-1]
        super().write_kv(k, v, key_cache, value_cache, slot_mapping)
