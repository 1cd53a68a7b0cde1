"""The goals beside the peers: what is met, missed or unknown comes from the figures alone."""

from __future__ import annotations

import pytest
from benchmarks.peers import goals
from benchmarks.peers.works import Figure


def _figure(
    row: str, engine: str, value: float, unit: str = "tokens/s", limit: float = 0
) -> Figure:
    return Figure(row, "bf16", engine, unit, values=[value], limit=limit)


def _found(row: str, wanted: str, *figures: Figure) -> list[str]:
    [line] = [
        goal.line({figure.key: figure for figure in figures})
        for goal in goals.GOALS
        if (goal.row, goal.weights) == (row, "bf16") and goal.wanted.startswith(wanted)
    ]
    return line[3:]


@pytest.mark.parametrize(
    ("value", "said"), [(105, ["1.05 x vLLM", "met"]), (104, ["1.04 x vLLM", "missed"])]
)
def test_the_best_peer_counts(value: float, said: list[str]) -> None:
    peers = [_figure("prefill-8x512", "vLLM", 100), _figure("prefill-8x512", "OpenVINO", 50)]
    assert _found("prefill-8x512", "", _figure("prefill-8x512", "vllm-di", value), *peers) == said


def test_less_time_is_better() -> None:
    ours, theirs = (
        _figure("server-ttft-p50", e, v, "ms") for e, v in (("vllm-di", 50), ("vLLM", 100))
    )
    assert _found("server-ttft-p50", "", ours, theirs) == ["2.00 x vLLM", "met"]


def test_a_share_of_the_limit() -> None:
    said = _found("decode-1", "90%", _figure("decode-1", "vllm-di", 45, limit=100))
    assert said == ["45% of the limit", "missed"]


def test_the_time_of_another_row() -> None:
    rows = [_figure("decode-1", "vllm-di", 90), _figure("decode-1-8k", "vllm-di", 60)]
    assert _found("decode-1-8k", "", *rows) == ["1.50 x the time", "met"]
    rows = [
        _figure("server-itl-p50", "vllm-di", 10, "ms"),
        _figure("server-itl-p99", "vllm-di", 30, "ms"),
    ]
    assert _found("server-itl-p99", "", *rows) == ["3.00 x the time", "missed"]


def test_a_figure_as_it_is() -> None:
    assert _found("memory", "", _figure("memory", "vllm-di", 701, "MB")) == ["701.0 MB", "missed"]


def test_what_was_not_measured_is_said_to_be_so() -> None:
    lines = goals.lines([Figure("decode-1", "bf16", "vLLM", "tokens/s", failed="no compiler")])
    assert {line[3] for line in lines} == {"not measured"}
    assert len(lines) == len(goals.GOALS)
