"""A model shared by several chips: XLA cuts the step, and puts the collectives in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm_di.components.interfaces import KvLayout
from vllm_di.components.messages import KvSpec
from vllm_di.errors import ConfigError

AXIS = "chips"


class Chips:
    """A mesh of one dimension. Heads, their cache and weights are cut evenly; all else is whole on
    each chip."""

    def __init__(self, jax: Any, chips: Sequence[Any], layout: KvLayout) -> None:
        self._jax, self._count = jax, len(chips)
        self.mesh = jax.sharding.Mesh(chips, (AXIS,))
        self._heads_dim = 1 if layout.name == "hnd" else 2
        self.caches = self._cut(self._heads_dim)

    def check(self, specs: Sequence[KvSpec]) -> None:
        """Raise ConfigError for heads that the chips cannot share evenly."""
        for heads in {spec.num_kv_heads for spec in specs}:
            if heads % self._count:
                raise ConfigError(
                    f"device.chips {self._count}: {heads} kv heads cannot be shared evenly; take "
                    f"a divisor of {heads}"
                )

    def constant(self, array: Any, is_weight: bool) -> Any:
        """On the chips: a matrix of weights cut by rows, what it gives, where they divide evenly.

        On one rank the traced step does not say how tensor parallelism would cut a weight. XLA
        makes any cut right; this one costs it more collectives between chips than the best."""
        return self._jax.device_put(array, self.place(array, is_weight))

    def place(self, array: Any, is_weight: bool) -> Any:
        """The sharding of a constant."""
        cut = is_weight and array.ndim > 1 and array.shape[0] % self._count == 0
        return self._cut(0 if cut else None)

    def by_heads(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """``attend`` of ``ragged.py`` on each chip's heads."""
        if self._count == 1:
            return attend
        P = self._jax.sharding.PartitionSpec
        heads, cache = P(None, AXIS), P(*[None] * self._heads_dim, AXIS)

        def run(*given: Any) -> Any:
            arrays, options = given[:9], given[9:]
            part = functools.partial(_with, attend, options)
            cut = self._jax.shard_map(
                part,
                mesh=self.mesh,
                in_specs=(heads, heads, heads, cache, *[P()] * 5),
                out_specs=(heads, cache),
                check_vma=False,
            )
            return cut(*arrays)

        return run

    def cut(self, cache: Any) -> Any:
        """A cache of a traced step, cut as it was given."""
        return self._jax.lax.with_sharding_constraint(cache, self.caches)

    def whole(self, rows: Any) -> Any:
        """Rows of a traced step, whole on each chip."""
        return self._jax.lax.with_sharding_constraint(rows, self._cut(None))

    def _cut(self, dim: int | None) -> Any:
        spec = () if dim is None else (*[None] * dim, AXIS)
        sharding = self._jax.sharding
        return sharding.NamedSharding(self.mesh, sharding.PartitionSpec(*spec))


def _with(attend: Callable[..., Any], options: Sequence[Any], *arrays: Any) -> Any:
    return attend(*arrays, *options)
