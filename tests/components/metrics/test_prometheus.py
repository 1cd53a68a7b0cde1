"""The registry is its own, totals become counters, old names are optional."""

from __future__ import annotations

from prometheus_client import REGISTRY

from vllm_di.components.interfaces import RequestTimes
from vllm_di.components.messages import EngineStats
from vllm_di.components.metrics.prometheus import PrometheusMetrics

LABELS = '{engine="0",model_name="m"}'


def lines(metrics: PrometheusMetrics) -> dict[str, float]:
    rows = metrics.render()[0].decode().splitlines()
    pairs = (row.rsplit(" ", 1) for row in rows if not row.startswith("#"))
    return {name: float(number) for name, number in pairs}


def make(*, compat: bool = True) -> PrometheusMetrics:
    return PrometheusMetrics(model_name="m", components={}, compat=compat)


def test_two_instances_share_nothing() -> None:
    before = len(list(REGISTRY.collect()))
    one, two = make(), make()
    one.tokens(5, 1, 0.1, None)
    assert lines(one)[f"vllm:prompt_tokens_total{LABELS}"] == 5
    assert lines(two)[f"vllm:prompt_tokens_total{LABELS}"] == 0
    assert len(list(REGISTRY.collect())) == before


def test_running_totals_of_the_engine() -> None:
    metrics = make()
    for preemptions, hits in [(1, 10), (3, 10), (3, 25)]:
        metrics.engine(
            EngineStats(
                num_running=2,
                num_waiting=4,
                kv_cache_usage=0.5,
                num_preemptions=preemptions,
                prefix_cache_hits=hits,
                step_tokens=7,
            )
        )
    found = lines(metrics)
    assert found[f"vllm:num_requests_running{LABELS}"] == 2
    assert found[f"vllm:num_requests_waiting{LABELS}"] == 4
    assert found[f"vllm:kv_cache_usage_perc{LABELS}"] == 0.5
    assert found[f"vllm:gpu_cache_usage_perc{LABELS}"] == 0.5
    assert found[f"vllm:num_preemptions_total{LABELS}"] == 3
    assert found[f"vllm:prefix_cache_hits_total{LABELS}"] == 25
    assert found[f"vllm:gpu_prefix_cache_hits_total{LABELS}"] == 25
    assert found[f"vllm:iteration_tokens_total_sum{LABELS}"] == 21


def test_old_names_are_optional() -> None:
    old = ("vllm:gpu_", "vllm:num_requests_swapped", "vllm:time_per_output_token_seconds")
    assert any(name.startswith(old) for name in lines(make()))
    assert not any(name.startswith(old) for name in lines(make(compat=False)))


def test_a_finished_text() -> None:
    metrics = make()
    times = RequestTimes(
        finish_reason="no such reason",
        num_prompt_tokens=3,
        num_generated_tokens=5,
        max_tokens=8,
        n=2,
        end_to_end=2.0,
        queue=0.5,
        prefill=0.5,
        decode=1.0,
    )
    metrics.finished(times)
    found = lines(metrics)
    assert found[f"vllm:request_time_per_output_token_seconds_sum{LABELS}"] == 0.25
    assert found[f"vllm:request_inference_time_seconds_sum{LABELS}"] == 1.5
    error = 'vllm:request_success_total{engine="0",finished_reason="error",model_name="m"}'
    assert found[error] == 1, "a label never holds what somebody else wrote"
