"""Ragged paged attention in jnp, for the host, and by the vendor's kernel, for a TPU. Imported
late, for JAX's sake."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib import util
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vllm_di.errors import PortError

QUERIES = 64
"""Tokens of a sequence that are attended for at once."""
KEYS = 256
"""Tokens of a context that are read at once."""
PACKAGE = "tpu_inference"
KERNEL = f"{PACKAGE}.kernels.ragged_paged_attention.v3.kernel"
UNSEEN = -1e30
"""A score that no query sees: finite, so that two of them have a difference."""


def in_jnp(
    q: Any,
    k: Any,
    v: Any,
    cache: Any,
    seq_lens: Any,
    table: Any,
    query_start: Any,
    slots: Any,
    counts: Any,
    scale: float,
    window: int,
    soft_cap: float,
) -> tuple[Any, Any]:
    """As the mark of ``attention.py`` -> (out, the cache with k and v).

    Goes through the sequences, their queries and their contexts piece by piece, with a softmax that
    is corrected as it goes: what it takes follows from the lengths of the step, not from the most
    that there could be.
    """
    tokens, heads, size = q.shape
    kv_heads, page = k.shape[1], cache.shape[1]
    cache = written(cache, k, v, slots)
    queries, pages = min(tokens, QUERIES), max(1, min(KEYS // page, table.shape[1]))
    keys_at_once = pages * page
    # room behind the last, so that no piece is moved to fit
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, size).astype(jnp.float32) * scale
    grouped = jnp.pad(grouped, ((0, queries), (0, 0), (0, 0), (0, 0)))

    def sequence(s: Any, out: Any) -> Any:
        start, count, length = query_start[s], query_start[s + 1] - query_start[s], seq_lens[s]

        def piece(i: Any, out: Any) -> Any:
            rows = lax.dynamic_slice_in_dim(grouped, start + i * queries, queries)
            position = length - count + i * queries + jnp.arange(queries)
            last = jnp.minimum(length, position[0] + queries)
            first = jnp.maximum(position[0] - window + 1, 0) // keys_at_once if window else 0

            def context(c: Any, state: Any) -> Any:
                most, total, mixed = state
                blocks = lax.dynamic_slice(table, (s, c * pages), (1, pages))[0]
                pairs = cache[blocks].reshape(keys_at_once, -1, cache.shape[-1])[..., :size]
                column = c * keys_at_once + jnp.arange(keys_at_once)
                filled = (column < length)[:, None, None]  # beyond: anything, NaN too
                pairs = jnp.where(filled, pairs.astype(jnp.float32), 0.0)
                keys, values = pairs[:, 0::2], pairs[:, 1::2]
                scores = jnp.einsum("qkgd,ckd->kgqc", rows, keys)
                if soft_cap:
                    scores = soft_cap * jnp.tanh(scores / soft_cap)
                seen = (column <= position[:, None]) & (column < length)
                if window:
                    seen &= column > position[:, None] - window
                scores = jnp.where(seen, scores, UNSEEN)
                higher = jnp.maximum(most, scores.max(-1))
                weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
                shrink = jnp.exp(most - higher)
                added = jnp.einsum("kgqc,ckd->kgqd", weights, values)
                total = total * shrink + weights.sum(-1)
                return higher, total, mixed * shrink[..., None] + added

            shape = (kv_heads, heads // kv_heads, queries)
            state = (jnp.full(shape, UNSEEN), jnp.zeros(shape), jnp.zeros((*shape, size)))
            _, total, mixed = lax.fori_loop(first, -(-last // keys_at_once), context, state)
            mixed = mixed / jnp.maximum(total, 1e-30)[..., None]
            # the rows behind the sequence's last are those of the next ones, which come later
            mixed = mixed.transpose(2, 0, 1, 3).reshape(queries, heads, size).astype(out.dtype)
            return lax.dynamic_update_slice_in_dim(out, mixed, start + i * queries, 0)

        return lax.fori_loop(0, -(-count // queries), piece, out)

    out = jnp.zeros((tokens + queries, heads, size), q.dtype)
    return lax.fori_loop(0, counts[2], sequence, out)[:tokens], cache


alone = jax.jit(in_jnp, static_argnums=(9, 10, 11))
"""For attention that no program compiles."""


def written(cache: Any, k: Any, v: Any, slots: Any) -> Any:
    pages, page, *_, lanes = cache.shape
    pairs = jnp.stack((k, v), 2).reshape(len(k), *cache.shape[2:4], k.shape[-1])
    pairs = jnp.pad(pairs, ((0, 0), (0, 0), (0, 0), (0, lanes - k.shape[-1])))
    slots = jnp.where(slots < 0, pages * page, slots)  # -1 would be the last; this one is dropped
    return cache.at[slots // page, slots % page].set(pairs.astype(cache.dtype), mode="drop")


def by_kernel(
    q: Any,
    k: Any,
    v: Any,
    cache: Any,
    seq_lens: Any,
    table: Any,
    query_start: Any,
    slots: Any,
    counts: Any,
    scale: float,
    window: int,
    soft_cap: float,
) -> tuple[Any, Any]:
    """The same by tpu-inference's kernel (0.32.0, ``kernels/ragged_paged_attention/v3``). It writes
    to the blocks of the table, whatever the slots say."""
    attend = load_kernel().ragged_paged_attention
    dtype = cache.dtype
    # the program's own precision is for float32 alone: no matrix unit takes bfloat16 with it
    exact = "highest" if dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(exact):
        out, cache = attend(
            q.astype(dtype),
            k.astype(dtype),
            v.astype(dtype),
            cache,
            seq_lens,
            table.reshape(-1),
            query_start,
            counts,
            sm_scale=scale,
            sliding_window=window or None,
            soft_cap=soft_cap or None,
        )
    return out.astype(q.dtype), cache


@functools.cache
def load_kernel() -> Any:
    """The vendor's module, without the package's own ``__init__``: that one imports vLLM, of which
    the kernel needs nothing. Raises PortError."""
    try:
        if (found := util.find_spec(PACKAGE)) is None:
            raise ImportError(f"no package {PACKAGE}")
        if PACKAGE in sys.modules:
            return importlib.import_module(KERNEL)
        sys.modules[PACKAGE] = util.module_from_spec(found)  # in name alone: it is not executed
        try:
            return importlib.import_module(KERNEL)
        finally:
            del sys.modules[PACKAGE]  # whoever imports it gets the whole
    except ImportError as error:
        raise PortError(
            f"attention=tpu runs the kernel of the Python package tpu-inference ({error}); install "
            "it with: pip install --no-deps tpu-inference==0.32.0, or take attention=sdpa "
            "kv_layout=hnd"
        ) from None
