"""A port's own scheduler and cache manager are judged without the keys of the engine's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conformance.mutants.catalog import BASE

from vllm_di.conformance.run import run
from vllm_di.conformance.subject import Subject

HERE = "tests.conformance.keyless"
CASES = (
    "graph/test_same_config_same_hash",
    "chunks/test_mixed_batches",
    "graphs/test_replay_equals_eager",
    "batching/test_same_answers_in_any_batch[uncached-3]",
    "cache/test_preempted_equals_not_preempted",
)
NEED_A_CACHE = (
    "batching/test_same_answers_in_any_batch[cached-3]",
    "cache/test_cached_equals_uncached",
    "cache/test_salts_do_not_share",
    "cache/test_a_reset_forgets",
)


def options(folder: Path, manager: str) -> Iterator[str]:
    """Writes the options; yields the overrides that choose them."""
    nodes = {
        "scheduler": f"_target_: {HERE}.Scheduler\nmax_num_seqs: 8\nmax_num_batched_tokens: 64\n",
        "kv_cache_manager": f"_target_: {HERE}.{manager}\n",
    }
    for slot, text in nodes.items():
        (folder / slot).mkdir()
        (folder / slot / "keyless.yaml").write_text(text, encoding="utf-8")
        yield f"{slot}=keyless"


def outcomes(*overrides: str, config_dirs: tuple[str, ...] = ()) -> dict[str, tuple[str, str]]:
    subject = Subject([*BASE, *overrides], config_dirs=config_dirs)
    try:
        report = run(subject, only=[*CASES, *NEED_A_CACHE], quiet=True)
    finally:
        subject.close()
    return {case.id: (case.outcome, case.message) for c in report.checks for case in c.cases}


@pytest.mark.parametrize("manager", ["Shares", "SharesNothing"])
def test_it_is_judged(tmp_path: Path, manager: str) -> None:
    found = outcomes(*options(tmp_path, manager), config_dirs=(str(tmp_path),))
    assert found.keys() == {*CASES, *NEED_A_CACHE}
    failed = {name: found[name] for name in CASES if found[name] != ("pass", "")}
    assert failed.keys() <= {"graphs/test_replay_equals_eager"}, failed  # it runs eagerly anyway
    for name in NEED_A_CACHE:
        if manager == "Shares":
            assert found[name] == ("pass", "")
        else:
            assert found[name][0] == "not-declared"
            assert "no key prefix_caching" in found[name][1]


def test_a_cache_that_is_turned_off_is_not_judged() -> None:
    found = outcomes("kv_cache_manager.prefix_caching=false")
    for name in NEED_A_CACHE:
        assert found[name] == ("not-declared", "kv_cache_manager.prefix_caching is false")
