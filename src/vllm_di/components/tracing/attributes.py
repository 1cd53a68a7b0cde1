"""The attributes of a request's span: OpenTelemetry's names for generative AI and HTTP, and vLLM's
for what these do not name.

OpenTelemetry: semantic-conventions v1.37.0, docs/gen-ai/gen-ai-spans.md, docs/http/http-spans.md.
vLLM: ``SpanAttributes`` of vllm/tracing. Durations are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_di.components.interfaces import RequestTimes, TracedRequest
from vllm_di.components.messages import SamplingParams

Value = str | int | float | bool | Sequence[str]


def span_name(request: TracedRequest) -> str:
    """``chat smollm2``, or ``POST /v1/score`` where the operation has no name."""
    if request.operation is None:
        return f"{request.method} {request.route}"
    return f"{request.operation} {request.model}"


def attributes(request: TracedRequest) -> dict[str, Value]:
    """All of a span."""
    found: dict[str, Value] = {
        "http.request.method": request.method,
        "http.route": request.route,
        "http.response.status_code": request.status,
        "http.request.header.x-request-id": [request.request_id],
        "gen_ai.provider.name": "vllm_di",
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
    }
    if request.operation is not None:
        found["gen_ai.operation.name"] = request.operation
    if request.response_id is not None:
        found |= {
            "gen_ai.response.id": request.response_id,
            "gen_ai.request.id": request.response_id,
        }
    if request.error is not None:
        found["error.type"] = request.error
    if request.params is not None:
        found |= _asked(request.params)
    if request.choices:
        found |= _answered(request.choices)
    return found


def _asked(params: SamplingParams) -> dict[str, Value]:
    found: dict[str, Value] = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": params.n,
    }
    if params.n > 1:
        found["gen_ai.request.choice.count"] = params.n
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    if params.seed is not None:
        found["gen_ai.request.seed"] = params.seed
    return found


def _answered(choices: Sequence[RequestTimes]) -> dict[str, Value]:
    """Tokens of all choices together, a prompt once for its choices. Times: to the first token of
    the first choice that has one, the longest wait, and the whole until the last choice ended."""
    first = min(choices, key=lambda choice: choice.queue + choice.prefill)
    last = max(choices, key=lambda choice: choice.end_to_end)
    num_prompt = sum(choice.num_prompt_tokens for choice in choices) // choices[0].n
    num_generated = sum(choice.num_generated_tokens for choice in choices)
    found: dict[str, Value] = {
        "gen_ai.usage.input_tokens": num_prompt,
        "gen_ai.usage.output_tokens": num_generated,
        "gen_ai.usage.prompt_tokens": num_prompt,
        "gen_ai.usage.completion_tokens": num_generated,
        "gen_ai.usage.num_sequences": len(choices),
        "gen_ai.response.finish_reasons": [choice.finish_reason for choice in choices],
        "gen_ai.latency.time_in_queue": max(choice.queue for choice in choices),
        "gen_ai.latency.time_in_model_prefill": first.prefill,
        "gen_ai.latency.time_in_model_decode": last.decode,
        "gen_ai.latency.time_in_model_inference": last.prefill + last.decode,
        "gen_ai.latency.e2e": last.end_to_end,
    }
    if num_generated:
        found["gen_ai.latency.time_to_first_token"] = first.queue + first.prefill
    return found
