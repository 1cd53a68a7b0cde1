"""Spans as a collector gets them, and what happens when none is there."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import closing
from typing import Any

import pytest
from tests.components.tracing.collector import HAS_OTLP, attributes_of, collecting

from vllm_di.components.interfaces import RequestTimes, TracedRequest
from vllm_di.components.messages import SamplingParams
from vllm_di.components.tracing.otlp import OtlpTracing
from vllm_di.errors import ConfigError

with_otlp = pytest.mark.skipif(not HAS_OTLP, reason="pip install 'vllm-di[otlp]'")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def tracing(endpoint: str, **keys: Any) -> OtlpTracing:
    defaults = {
        "service_name": "a-server",
        "sample_ratio": 1.0,
        "max_queue": 8,
        "max_batch": 4,
        "delay_seconds": 0.02,
        "timeout_seconds": 60.0,
        "close_seconds": 60.0,
    }
    return OtlpTracing(endpoint=endpoint, **{**defaults, **keys})


def times(**values: Any) -> RequestTimes:
    plain: dict[str, Any] = {
        "finish_reason": "stop",
        "num_prompt_tokens": 7,
        "num_generated_tokens": 3,
        "max_tokens": 5,
        "n": 1,
        "end_to_end": 1.0,
        "queue": 0.25,
        "prefill": 0.25,
        "decode": 0.5,
    }
    return RequestTimes(**{**plain, **values})


def request(**values: Any) -> TracedRequest:
    plain: dict[str, Any] = {
        "method": "POST",
        "route": "/v1/chat/completions",
        "operation": "chat",
        "model": "echo",
        "request_id": "mine",
        "response_id": "chatcmpl-1",
        "status": 200,
        "error": None,
        "started": 1_700_000_000.0,
        "ended": 1_700_000_001.5,
        "headers": {},
        "params": SamplingParams(temperature=0.5, top_p=0.75, max_tokens=5, seed=3),
        "choices": [times()],
    }
    return TracedRequest(**{**plain, **values})


@with_otlp
def test_a_span_has_all_that_is_known() -> None:
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
    with collecting() as collector:
        with closing(tracing(collector.url)) as spans:
            spans.record(request(headers=parent))
        (span,) = collector.spans
        (resource,) = collector.resources
    assert (span.name, span.kind) == ("chat echo", 2), "a server's"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.end_time_unix_nano - span.start_time_unix_nano == 1_500_000_000
    assert span.start_time_unix_nano == 1_700_000_000_000_000_000
    assert span.status.code == 0
    assert resource["service.name"] == "a-server"
    assert attributes_of(span) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "http.request.header.x-request-id": ["mine"],
        "gen_ai.provider.name": "vllm_di",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "echo",
        "gen_ai.response.model": "echo",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.request.id": "chatcmpl-1",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.n": 1,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.prompt_tokens": 7,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_in_model_prefill": 0.25,
        "gen_ai.latency.time_in_model_decode": 0.5,
        "gen_ai.latency.time_in_model_inference": 0.75,
        "gen_ai.latency.time_to_first_token": 0.5,
        "gen_ai.latency.e2e": 1.0,
    }


@with_otlp
def test_several_choices_and_failures() -> None:
    two = [times(n=2, queue=0.5), times(n=2, finish_reason="length", decode=2.0, end_to_end=3.0)]
    failed = request(
        status=503, error="engine_dead", choices=[], params=None, response_id=None, operation=None
    )
    with collecting() as collector:
        with closing(tracing(collector.url)) as spans:
            spans.record(request(choices=two, params=SamplingParams(n=2)))
            spans.record(failed)
            spans.record(request(status=400, error="invalid_type", headers={"traceparent": "?"}))
        first, second, third = collector.spans
    found = attributes_of(first)
    assert found["gen_ai.request.choice.count"] == 2
    assert found["gen_ai.usage.input_tokens"] == 7, "the prompt of both"
    assert found["gen_ai.usage.output_tokens"] == 6
    assert found["gen_ai.response.finish_reasons"] == ["stop", "length"]
    assert found["gen_ai.latency.time_in_queue"] == 0.5
    assert found["gen_ai.latency.time_to_first_token"] == 0.5
    assert found["gen_ai.latency.e2e"] == 3.0
    assert second.name == "POST /v1/chat/completions"
    assert (second.status.code, second.status.message) == (2, "engine_dead")
    assert attributes_of(second)["error.type"] == "engine_dead"
    assert (third.status.code, third.parent_span_id) == (0, b""), "a client's fault, no parent"


@with_otlp
def test_samples() -> None:
    with collecting() as collector:
        with closing(tracing(collector.url, sample_ratio=0.0)) as spans:
            spans.record(request())
            spans.record(request(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}))
            spans.record(request(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}))
        assert [span.trace_id.hex() for span in collector.spans] == [TRACE]


@with_otlp
def test_what_clients_send_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    parent = f"00-{TRACE}-{PARENT}-01"
    sent = [
        {"traceparent": parent, "tracestate": "no member"},
        {"traceparent": parent, "tracestate": ",".join(f"a{i}=1" for i in range(40))},
        {"traceparent": parent, "tracestate": "a=1," * 5000},
        {"traceparent": f"{parent}-{'x' * 1000}"},
    ]
    with collecting() as collector:
        with closing(tracing(collector.url)) as spans:
            for headers in sent:
                spans.record(request(headers=headers))
        assert len(collector.spans) == len(sent)
    assert not [r.getMessage() for r in caplog.records if "urllib3" not in r.name]


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@with_otlp
@pytest.mark.parametrize("is_there", [True, False])
def test_a_collector_that_takes_nothing(is_there: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One line, a queue that has a bound, and an end that comes."""
    with collecting() as collector:
        collector.status = 503
        url = collector.url if is_there else f"http://127.0.0.1:{closed_port()}/v1/traces"
        with closing(tracing(url, timeout_seconds=0.3)) as spans:
            for _ in range(40):
                spans.record(request())
    lines = [r.getMessage() for r in caplog.records if "urllib3" not in r.name]
    full, down = sorted(lines)
    assert full == "tracing: 8 spans wait (tracing.max_queue): further ones are dropped"
    assert f"tracing: {url} takes no spans" in down


@with_otlp
def test_a_collector_that_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    with collecting() as collector:
        collector.status = 400
        with closing(tracing(collector.url)) as spans:
            spans.record(request())
            while "takes no spans" not in caplog.text:
                time.sleep(0.002)
            collector.status = 200
            spans.record(request())
        assert len(collector.spans) == 1
    assert "takes spans again; 1 were lost" in caplog.text


@with_otlp
def test_a_collector_that_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        spans = tracing(url, timeout_seconds=60.0, close_seconds=0.1)
        spans.record(request())
        spans.close()
    assert "the last spans were not sent within 0.1 s" in caplog.text


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://a/b", "http://", "http://[::1", ""])
def test_wrong_endpoints(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"^endpoint: .* expected the URL of a collector"):
        tracing(endpoint)


def test_wrong_sizes() -> None:
    with pytest.raises(ConfigError, match="max_batch: 9 is more than max_queue=8"):
        tracing("http://127.0.0.1:1/v1/traces", max_batch=9)


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
from vllm_di.components.tracing.none import NoTracing
from vllm_di.components.tracing.otlp import OtlpTracing
from vllm_di.errors import ConfigError
NoTracing()
try:
    OtlpTracing(endpoint="http://127.0.0.1:1/", service_name="", sample_ratio=1.0, max_queue=1,
                max_batch=1, delay_seconds=1, timeout_seconds=1, close_seconds=0)
except ConfigError as error:
    assert "pip install 'vllm-di[otlp]'" in str(error), error
    print("refused")
"""


def test_without_the_package() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")
