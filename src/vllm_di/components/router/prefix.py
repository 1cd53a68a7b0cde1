"""The replica that holds most of a prompt already, unless it has much more to do than another."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec

from vllm_di.components.interfaces import ReplicaLoad, Router
from vllm_di.components.messages import EngineRequest
from vllm_di.components.router.least_loaded import LoadKind, least_loaded

Count = Annotated[int, msgspec.Meta(ge=1, le=2**24)]

FIRST_WIDTH = 16
"""Tokens between two remembered beginnings of a prompt, at first."""
PER_WIDTH = 8
"""After as many the width doubles: a beginning is found to an eighth of its length, and a prompt
takes a number of entries that grows with the logarithm of its length."""
MOST_HASHED = 16
"""Of the tokens between two of them, evenly spread: prompts that part are unlike in most places."""


class PrefixRouter(Router):
    """Remembers which beginnings of prompts each replica was sent, under their hash and the
    request's salt: a replica's prefix cache holds them, or has just given them up.

    The memory is one table for all replicas, bounded by ``max_entries``. A hash that two prompts
    share costs a worse choice, never a wrong answer. The time of a call grows as the entries do,
    with the logarithm of the prompt's length.
    """

    def __init__(
        self,
        *,
        max_lead: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 8,
        max_entries: Count = 32_768,
        load: LoadKind = "requests",
    ) -> None:
        self._max_lead, self._max_entries = max_lead, max_entries
        self._load: LoadKind = load
        self._holders: OrderedDict[int, int] = OrderedDict()
        """Hash of a beginning to the replicas that were sent it: bit r for replica r. The least
        recently used first."""
        self._seed = secrets.randbits(60)

    @property
    def num_entries(self) -> int:
        """Beginnings that are remembered: ``max_entries`` at most."""
        return len(self._holders)

    def choose(self, request: EngineRequest, loads: Sequence[ReplicaLoad]) -> int:
        keys = self._keys(request)
        most = self._max_lead + min([load.num_requests for load in loads])
        chosen = least_loaded(self._holding(keys, loads, most), self._load)
        self._remember(keys, 1 << chosen)
        return chosen

    def _holding(
        self, keys: Sequence[int], loads: Sequence[ReplicaLoad], most: int
    ) -> Sequence[ReplicaLoad]:
        """Of the replicas with ``most`` requests at most, those that were sent the longest of the
        beginnings; all of them where none was sent any."""
        holders: list[int] = []
        for key in keys:
            bits = self._holders.get(key, 0) & (holders[-1] if holders else -1)
            if not bits:
                break
            holders.append(bits)
        known = {load.replica: load for load in loads} if holders else {}
        seen = 0
        for bits in reversed(holders):
            found = [known[r] for r in _ones(bits & ~seen) if r in known]
            if found := [load for load in found if load.num_requests <= most]:
                return found
            seen = bits
        return [load for load in loads if load.num_requests <= most]

    def forget(self, replica: int) -> None:
        kept = ((key, bits & ~(1 << replica)) for key, bits in self._holders.items())
        self._holders = OrderedDict((key, bits) for key, bits in kept if bits)

    def _remember(self, keys: Sequence[int], bit: int) -> None:
        holders = self._holders
        for key in reversed(keys):  # a longer beginning goes before the shorter ones that it needs
            known = holders.get(key)
            if known is None:
                holders[key] = bit
                continue
            if not known & bit:
                holders[key] = known | bit
            holders.move_to_end(key)
        while len(holders) > self._max_entries:
            holders.popitem(last=False)

    def _keys(self, request: EngineRequest) -> list[int]:
        """Of the beginnings of a prompt, the shortest first."""
        tokens = request.prompt_token_ids
        key = hash((self._seed, request.cache_salt))
        keys: list[int] = []
        begin, width = 0, FIRST_WIDTH
        while (end := begin + width) <= len(tokens):
            key = hash((key, tuple(tokens[begin : end : width // MOST_HASHED])))
            keys.append(key)
            begin = end
            if len(keys) % PER_WIDTH == 0:
                width *= 2
        return keys


def _ones(bits: int) -> Iterator[int]:
    """The places of the bits that are set."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
