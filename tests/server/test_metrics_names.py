"""Every series that dashboards and routers query is in a scrape."""

from __future__ import annotations

import re

import httpx
import pytest
from tests.server.fakes import CHAT, COMPLETIONS, EchoEngine, chat, completion, with_client

GAUGES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:num_requests_swapped",
]
COUNTERS = [
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
]
HISTOGRAMS = [
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:iteration_tokens_total",
]
LABELS = 'engine="0",model_name="echo"'


def value(text: str, series: str) -> float:
    (found,) = re.findall(rf"^{re.escape(series)} (\S+)$", text, flags=re.M)
    return float(found)


@pytest.mark.parametrize("stream", [False, True])
def test_every_series_is_there_and_counts(stream: bool) -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        request = chat("hello", n=2, max_tokens=4, stream=stream)
        assert (await client.post(CHAT, json=request)).status_code == 200
        stopped = completion([97, 98], stop="b", max_tokens=9, stream=stream)
        assert (await client.post(COMPLETIONS, json=stopped)).status_code == 200
        await client.post(CHAT, json=chat(temperature=-1))
        await client.get("/some/path/of/a/client?secret=1")
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = response.text
        for name in GAUGES + COUNTERS:
            assert value(text, f"{name}{{{LABELS}}}") >= 0
        for name in HISTOGRAMS:
            assert value(text, f"{name}_count{{{LABELS}}}") >= 0
            assert f'{name}_bucket{{engine="0",le="+Inf",model_name="echo"}}' in text
        assert value(text, f"vllm:prompt_tokens_total{{{LABELS}}}") == 5 + 2
        assert value(text, f"vllm:generation_tokens_total{{{LABELS}}}") == 8 + 2
        assert value(text, f"vllm:time_to_first_token_seconds_count{{{LABELS}}}") == 3
        assert value(text, f"vllm:inter_token_latency_seconds_count{{{LABELS}}}") == 2 * 3 + 1
        assert value(text, f"vllm:e2e_request_latency_seconds_count{{{LABELS}}}") == 3
        assert value(text, f"vllm:request_prompt_tokens_sum{{{LABELS}}}") == 5 + 5 + 2
        assert value(text, f"vllm:iteration_tokens_total_sum{{{LABELS}}}") == 8 + 2
        success = 'vllm:request_success_total{engine="0",finished_reason="%s",model_name="echo"}'
        assert value(text, success % "length") == 2
        assert value(text, success % "stop") == 1
        http = 'http_requests_total{handler="%s",status="%s"}'
        assert value(text, http % (CHAT, "2xx")) == 1
        assert value(text, http % (CHAT, "4xx")) == 1
        assert value(text, http % ("other", "4xx")) == 1
        assert "secret" not in text
        assert "/some/path" not in text
        assert 'vllm:cache_config_info{block_size="16",engine="0"' in text
        assert "vllm:lora_requests_info{" in text
        (parts,) = re.findall(r"^vllm_di_components_info\{(.*)\} 1.0$", text, flags=re.M)
        assert 'platform="test"' in parts
        assert 'tokenizer="BytesTokenizer"' in parts

    with_client(test)


def test_a_scrape_before_the_first_request_knows_the_engine() -> None:
    async def test(client: httpx.AsyncClient, engine: EchoEngine) -> None:
        assert "vllm:cache_config_info{" in (await client.get("/metrics")).text
        assert (await client.head("/metrics")).status_code == 200

    with_client(test)
