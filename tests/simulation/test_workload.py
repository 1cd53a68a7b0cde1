"""Requests by stated distributions."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from tests.simulation.made_up import load

from vllm_di.errors import ConfigError
from vllm_di.simulation.workload import Lengths, requests


def test_lengths_and_gaps_are_distributed_as_stated() -> None:
    asked = list(
        requests(
            load(4000, given="lognormal:200,0.5", wanted="uniform:10,30", rate=50.0), 320, 10**6
        )
    )
    given, wanted = [len(a.prompt) for a in asked], [a.output for a in asked]
    assert statistics.median(given) == pytest.approx(200, rel=0.05)
    assert statistics.mean(given) == pytest.approx(200 * 2.718281828**0.125, rel=0.05)
    assert (min(wanted), max(wanted)) == (10, 30)
    assert statistics.mean(wanted) == pytest.approx(20, rel=0.03)
    assert statistics.mean(a.gap for a in asked) == pytest.approx(1 / 50, rel=0.05)


def test_prefixes_are_shared_by_their_share() -> None:
    workload = load(1000, given="8", prefixes=5, prefix_len=32)
    heads = {tuple(a.prompt[:32]) for a in requests(workload, 320, 2048)}
    assert len(heads) == 5
    half = [len(a.prompt) for a in requests(replace(workload, prefix_share=0.5), 320, 2048)]
    assert set(half) == {8, 40}
    assert half.count(40) == pytest.approx(500, abs=60)


def test_a_seed_is_a_workload() -> None:
    one, again, other = (
        list(requests(load(20, given="uniform:1,50", seed=seed), 320, 2048)) for seed in (1, 1, 2)
    )
    assert one == again and one != other


def test_tokens_are_within_the_vocabulary() -> None:
    tokens = {t for a in requests(load(200), 320, 2048) for t in a.prompt}
    assert min(tokens) == 100 and max(tokens) == 319


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "there is no distribution|expected fixed:TOKENS"),
        ("0", "0 is not from 1"),
        ("1.5", "whole numbers"),
        ("nan", "nan is not from 1"),
        ("inf", "inf is not from 1"),
        ("1e9", "is not from 1"),
        ("uniform:5", "expected uniform:LEAST,MOST"),
        ("uniform:9,5", "5, is not from 9"),
        ("lognormal:100,9", "a sigma of 9 is not from 0 to 4"),
        ("lognorml:100,1", "did you mean 'lognormal'"),
        ("uniform:", "expected uniform:LEAST,MOST"),
        ("fixed:1,2", "expected fixed:TOKENS"),
    ],
)
def test_a_bad_length_is_told_with_its_flag(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--input-len: .*({message})"):
        Lengths.parse(text, "--input-len")


def test_lengths_print_as_they_are_written() -> None:
    for text in ("128", "uniform:1,5", "lognormal:256,0.8"):
        assert str(Lengths.parse(text, "-x")) == text
    assert "60 requests, 2 at a time; prompts of 32 tokens; answers of 3" in str(load(60))
