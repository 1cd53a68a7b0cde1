"""Which replica a request goes to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_di.components.interfaces import ReplicaLoad, Router
from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.components.router.least_loaded import LeastLoadedRouter
from vllm_di.components.router.prefix import FIRST_WIDTH, PER_WIDTH, PrefixRouter
from vllm_di.components.router.round_robin import RoundRobinRouter


def request(tokens: Sequence[int], salt: str | None = None) -> EngineRequest:
    params = SamplingParams(temperature=0)
    return EngineRequest(
        request_id="r", prompt_token_ids=list(tokens), params=params, cache_salt=salt
    )


def loads(*counts: int) -> list[ReplicaLoad]:
    return [ReplicaLoad(i, count, 10 * count) for i, count in enumerate(counts)]


def test_round_robin_passes_those_that_are_away() -> None:
    router, all_three = RoundRobinRouter(), loads(0, 0, 0)
    assert [router.choose(request([1]), all_three) for _ in range(4)] == [0, 1, 2, 0]
    without_one = [all_three[0], all_three[2]]
    assert [router.choose(request([1]), without_one) for _ in range(3)] == [2, 0, 2]


def test_least_loaded_counts_what_it_is_told_to() -> None:
    given_loads = [ReplicaLoad(0, 1, 5000), ReplicaLoad(1, 3, 40), ReplicaLoad(2, 1, 4000)]
    assert LeastLoadedRouter().choose(request([1]), given_loads) == 2
    assert LeastLoadedRouter(load="tokens").choose(request([1]), given_loads) == 1


def test_a_prompt_goes_where_its_beginning_is() -> None:
    router = PrefixRouter()
    first, second = list(range(100)), list(range(500, 600))
    assert router.choose(request(first), loads(0, 0)) == 0
    assert router.choose(request(second), loads(1, 0)) == 1
    assert router.choose(request([*first, *range(900, 950)]), loads(3, 0)) == 0
    assert router.choose(request([*second, 7]), loads(0, 3)) == 1
    # of two that hold the same, the one with less to do
    assert router.choose(request(range(2000, 2100)), loads(0, 5)) == 0
    assert router.choose(request(range(2000, 2100)), loads(20, 5)) == 1
    assert router.choose(request(range(2000, 2100)), loads(6, 5)) == 1
    # the longest beginning wins
    assert router.choose(request([*range(2000, 2100), *range(64)]), loads(0, 5)) == 0
    assert router.choose(request([*range(2000, 2100), *range(64), 1]), loads(5, 0)) == 0


def test_a_lead_in_load_beats_the_prefix() -> None:
    router = PrefixRouter(max_lead=2)
    prompt = request(range(64))
    assert router.choose(prompt, loads(0, 0)) == 0
    assert router.choose(prompt, loads(2, 0)) == 0
    assert router.choose(prompt, loads(3, 0)) == 1


def test_the_salt_counts() -> None:
    router = PrefixRouter()
    assert router.choose(request(range(64), "a"), loads(0, 1)) == 0
    assert router.choose(request(range(64), "a"), loads(1, 0)) == 0
    assert router.choose(request(range(64), "b"), loads(1, 0)) == 1
    assert router.choose(request(range(64)), loads(1, 0)) == 1


def test_what_a_replica_held_is_forgotten_with_it() -> None:
    router = PrefixRouter()
    assert router.choose(request(range(64)), loads(0, 1)) == 0
    router.forget(0)
    assert router.num_entries == 0
    assert router.choose(request(range(64)), loads(1, 0)) == 1


def test_the_least_recently_used_goes_first_and_from_its_end() -> None:
    router = PrefixRouter(max_entries=2 * PER_WIDTH)
    old, kept = range(PER_WIDTH * FIRST_WIDTH), range(1000, 1000 + PER_WIDTH * FIRST_WIDTH)
    assert router.choose(request(old), loads(0, 1)) == 0
    assert router.choose(request(kept), loads(0, 1)) == 0
    assert router.choose(request(range(5000, 5000 + 4 * FIRST_WIDTH)), loads(0, 1)) == 0
    assert router.num_entries == 2 * PER_WIDTH
    # the half of the oldest that is left still finds it
    assert router.choose(request(old), loads(1, 0)) == 0
    assert router.choose(request(range(9000, 9000 + 40 * FIRST_WIDTH)), loads(0, 1)) == 0
    assert router.choose(request(kept), loads(1, 0)) == 1


ROUTERS = [RoundRobinRouter, LeastLoadedRouter, lambda: PrefixRouter(max_entries=20)]
LOADS = st.lists(
    st.tuples(st.integers(0, 63), st.integers(0, 50), st.integers(0, 9999)),
    min_size=1,
    max_size=6,
    unique_by=lambda load: load[0],
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ROUTERS),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3000), LOADS, st.booleans()), max_size=12),
)
def test_a_choice_is_one_of_those_offered_and_memory_is_bounded(
    make: type[Router], asked: list[tuple[int, int, list[tuple[int, int, int]], bool]]
) -> None:
    router = make()
    for first, length, offered, ends in asked:
        choice = router.choose(
            request(range(first, first + length)), [ReplicaLoad(*load) for load in offered]
        )
        assert choice in {load[0] for load in offered}
        if isinstance(router, PrefixRouter):
            assert router.num_entries <= 20
        if ends:
            router.forget(choice)


@pytest.mark.parametrize("length", [0, 15, 16, 100, 1_000, 100_000])
def test_entries_grow_with_the_logarithm_of_the_length(length: int) -> None:
    router = PrefixRouter()
    router.choose(request(range(length)), loads(0, 0))
    assert router.num_entries <= PER_WIDTH * max(0, (length // FIRST_WIDTH).bit_length())
    assert bool(router.num_entries) == (length >= FIRST_WIDTH)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_choice_among_many_is_that_of_a_walk_over_all(data: st.DataObject) -> None:
    """The longest beginning that one with room was sent, then the least load: by sets here."""
    router, sent = PrefixRouter(max_lead=2), dict[int, list[list[int]]]()
    numbers = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=6, unique=True))
    for _ in range(data.draw(st.integers(1, 12))):
        counts = [ReplicaLoad(n, data.draw(st.integers(0, 4)), n % 3) for n in numbers]
        parts = data.draw(st.lists(st.integers(0, 2), max_size=4))
        prompt = [part for part in parts for _ in range(FIRST_WIDTH)]
        most = 2 + min(load.num_requests for load in counts)
        able = [load for load in counts if load.num_requests <= most]

        def known(load: ReplicaLoad, prompt: list[int] = prompt) -> int:
            """Tokens of the longest beginning that it was sent."""
            ends = range(FIRST_WIDTH, len(prompt) + 1, FIRST_WIDTH)
            was = sent.get(load.replica, [])
            return max((e for e in ends if any(w[:e] == prompt[:e] for w in was)), default=0)

        longest = max(map(known, able))
        best = [load for load in able if known(load) == longest]
        wanted = LeastLoadedRouter().choose(request(prompt), best)
        assert router.choose(request(prompt), counts) == wanted
        sent.setdefault(wanted, []).append(prompt)
