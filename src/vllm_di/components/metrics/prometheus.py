"""Prometheus series under the names that vLLM's dashboards and the gateway routers query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from vllm_di.components.interfaces import INTERFACE_VERSION, Metrics, RequestTimes
from vllm_di.components.messages import EngineStats, WorkerReport

M = TypeVar("M", Gauge, Counter, Histogram)

_FINISH_REASONS = ("stop", "length", "abort", "error")
# Buckets, in seconds or tokens: vLLM's, so that its dashboards' quantiles mean the same.
_FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0]
_FIRST_TOKEN += [7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0]
_BETWEEN_TOKENS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
_BETWEEN_TOKENS += [0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
_WHOLE_REQUEST = [0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0]
_WHOLE_REQUEST += [40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0]
_TOKENS = [float(m * 10**e) for e in range(6) for m in (1, 2, 5)]
_STEP_TOKENS = [1.0, *(float(2**e) for e in range(3, 15))]
_CHOICES = [1.0, 2.0, 5.0, 10.0, 20.0]


class PrometheusMetrics(Metrics):
    """Counts in a registry of its own. Labels hold the model's name, the replica's number, slots'
    classes, HTTP status classes and route templates, never text from a request."""

    def __init__(
        self, *, model_name: str | None, components: dict[str, str], compat: bool = True
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._model_name, self._components, self._compat = model_name or "model", components, compat
        self._families: dict[str, Any] = {}
        self._of: dict[int, PrometheusMetrics] = {0: self}
        self._http = Counter(
            "http_requests", "HTTP requests.", ("handler", "status"), registry=self._registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP requests, to the end of the answer.",
            ("handler",),
            registry=self._registry,
            buckets=_WHOLE_REQUEST,
        )
        self._make_series(0)

    def _make_series(self, replica: int) -> None:
        """Those with the label ``engine``: each replica has its own."""
        compat = self._compat
        self._labels = {"model_name": self._model_name, "engine": str(replica)}
        self._totals: dict[str, int] = {}
        g, c, h = self._gauge, self._counter, self._histogram
        aliased = ("vllm:gpu_cache_usage_perc",) if compat else ()
        self._running = g("vllm:num_requests_running", "Requests in the running batch.")
        self._waiting = g("vllm:num_requests_waiting", "Requests waiting to run.")
        self._kv_usage = [
            g(name, "Share of KV-cache blocks in use, 0 to 1.")
            for name in ("vllm:kv_cache_usage_perc", *aliased)
        ]
        if compat:
            g("vllm:num_requests_swapped", "Always 0: preemption is by recompute.")
        self._prompt_tokens = c("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = c("vllm:generation_tokens", "Tokens generated.")
        self._preemptions = c("vllm:num_preemptions", "Preemptions.")
        self._success = {
            reason: c("vllm:request_success", "Finished texts.", finished_reason=reason)
            for reason in _FINISH_REASONS
        }
        prefixes = (
            ("vllm:prefix_cache", "vllm:gpu_prefix_cache") if compat else ("vllm:prefix_cache",)
        )
        self._cache_queries = [c(f"{p}_queries", "Prompt tokens looked up.") for p in prefixes]
        self._cache_hits = [c(f"{p}_hits", "Prompt tokens found.") for p in prefixes]
        self._first_token = h(
            "vllm:time_to_first_token_seconds", "To the first token.", _FIRST_TOKEN
        )
        names = ["vllm:inter_token_latency_seconds"]
        names += ["vllm:time_per_output_token_seconds"] if compat else []
        self._between_tokens = [h(name, "Between two outputs.", _BETWEEN_TOKENS) for name in names]
        self._per_output_token = h(
            "vllm:request_time_per_output_token_seconds",
            "Mean time of a token after the first.",
            _BETWEEN_TOKENS,
        )
        self._end_to_end = h("vllm:e2e_request_latency_seconds", "Whole request.", _WHOLE_REQUEST)
        self._queue = h("vllm:request_queue_time_seconds", "Waiting.", _WHOLE_REQUEST)
        self._prefill = h("vllm:request_prefill_time_seconds", "Prefill.", _WHOLE_REQUEST)
        self._decode = h("vllm:request_decode_time_seconds", "Decode.", _WHOLE_REQUEST)
        self._inference = h(
            "vllm:request_inference_time_seconds", "Prefill and decode.", _WHOLE_REQUEST
        )
        self._request_prompt = h("vllm:request_prompt_tokens", "Prompt length.", _TOKENS)
        self._request_generation = h("vllm:request_generation_tokens", "Text length.", _TOKENS)
        self._request_max = h(
            "vllm:request_max_num_generation_tokens", "Most tokens asked for.", _TOKENS
        )
        self._params_n = h("vllm:request_params_n", "The parameter n.", _CHOICES)
        self._params_max = h("vllm:request_params_max_tokens", "The parameter max_tokens.", _TOKENS)
        self._step_tokens = h("vllm:iteration_tokens_total", "Tokens in a step.", _STEP_TOKENS)
        self._compiles = c("vllm_di:compiles_after_ready", "Programs that a step had to wait for.")
        self._unknown_fields = c(
            "vllm_di:unknown_request_fields", "Fields of requests that the server does not know."
        )

    def of(self, replica: int) -> PrometheusMetrics:
        found = self._of.get(replica)
        if found is None:
            found = self._of[replica] = copy(self)
            found._make_series(replica)
        return found

    def tokens(
        self,
        num_prompt: int,
        num_generated: int,
        first_after: float | None,
        inter_token: float | None,
    ) -> None:
        if num_prompt:
            self._prompt_tokens.inc(num_prompt)
        if num_generated:
            self._generation_tokens.inc(num_generated)
        if first_after is not None:
            self._first_token.observe(first_after)
        if inter_token is not None:
            for histogram in self._between_tokens:
                histogram.observe(inter_token)

    def finished(self, times: RequestTimes) -> None:
        self._success.get(times.finish_reason, self._success["error"]).inc()
        self._end_to_end.observe(times.end_to_end)
        self._queue.observe(times.queue)
        self._prefill.observe(times.prefill)
        self._decode.observe(times.decode)
        self._inference.observe(times.prefill + times.decode)
        self._request_prompt.observe(times.num_prompt_tokens)
        self._request_generation.observe(times.num_generated_tokens)
        self._params_n.observe(times.n)
        if times.max_tokens is not None:
            self._request_max.observe(times.max_tokens)
            self._params_max.observe(times.max_tokens)
        if times.num_generated_tokens > 1:
            self._per_output_token.observe(times.decode / (times.num_generated_tokens - 1))

    def engine(self, stats: EngineStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        for gauge in self._kv_usage:
            gauge.set(stats.kv_cache_usage)
        self._raise_to("preemptions", stats.num_preemptions, [self._preemptions])
        self._raise_to("queries", stats.prefix_cache_queries, self._cache_queries)
        self._raise_to("hits", stats.prefix_cache_hits, self._cache_hits)
        self._raise_to("compiles", stats.num_compiles, [self._compiles])
        if stats.step_tokens:
            self._step_tokens.observe(stats.step_tokens)

    def http(self, handler: str, status: int, seconds: float) -> None:
        self._http.labels(handler, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler).observe(seconds)

    def unknown_fields(self, count: int) -> None:
        """Fields of one request that the server does not know."""
        self._unknown_fields.inc(count)

    def info(self, report: WorkerReport, labels: Mapping[str, str]) -> None:
        cache = {"block_size": str(report.block_size), "num_gpu_blocks": str(report.num_blocks)}
        self._gauge("vllm:cache_config_info", "The KV cache.", **cache).set(1)
        lora = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        self._gauge("vllm:lora_requests_info", "LoRA adapters: none.", **lora).set(1)
        if (warm_up := report.warm_up) is not None:
            g = self._gauge
            g("vllm_di:warm_up_seconds", "Compiling and warm-up.").set(warm_up.seconds)
            g("vllm_di:warm_up_programs", "Programs compiled by then.").set(warm_up.num_programs)
            if warm_up.program_bytes is not None:
                text = "Memory that programs, graphs and workspaces took."
                g("vllm_di:warm_up_program_bytes", text).set(warm_up.program_bytes)
        parts = {"interface_version": INTERFACE_VERSION, "device": report.device}
        parts |= {"dtype": report.dtype} | self._components | dict(labels)
        self._gauge("vllm_di_components_info", "What fills the slots.", **parts).set(1)

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def _gauge(self, name: str, text: str, **labels: str) -> Gauge:
        return self._make(Gauge, name, text, labels)

    def _counter(self, name: str, text: str, **labels: str) -> Counter:
        return self._make(Counter, name, text, labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return self._make(Histogram, name, text, {}, buckets=buckets)

    def _make(
        self, kind: type[M], name: str, text: str, labels: Mapping[str, str], **more: Any
    ) -> M:
        """The series with its labels bound. Series of one name share a family."""
        values = self._labels | dict(labels)
        family = self._families.get(name)
        if family is None:
            family = kind(name, text, tuple(values), registry=self._registry, **more)
            self._families[name] = family
        bound: M = family.labels(**values)
        return bound

    def _raise_to(self, name: str, total: int, counters: Sequence[Counter]) -> None:
        """Bring counters up to a running total."""
        grown = total - self._totals.get(name, 0)
        self._totals[name] = total
        if grown > 0:
            for counter in counters:
                counter.inc(grown)
