"""What a sequence's request is told of a step."""

from __future__ import annotations

from vllm_di.components.messages import SampledTokens, TokenOutput
from vllm_di.components.scheduler.sequence import Sequence

MASKS = ("allowed_token_ids", "bad_words", "min_tokens")
"""Parameters that may leave no token to choose."""


def output_of(sequence: Sequence, token_ids: list[int]) -> TokenOutput:
    """The first of a sequence also tells of its prompt."""
    output = TokenOutput(request_id=sequence.request.request_id, token_ids=token_ids)
    if not sequence.reported:
        sequence.reported = True
        output.num_cached_tokens = max(0, sequence.num_cached)
        output.queue_time = sequence.queue_time
        if sequence.request.params.prompt_logprobs is not None:
            output.prompt_logprobs = sequence.prompt_logprobs
    return output


def error_of(sequence: Sequence, reason: str, status: int) -> TokenOutput:
    """The last of a sequence that cannot go on; 400 where its own parameters are the cause."""
    output = output_of(sequence, [])
    output.finish_reason, output.error, output.error_status = "error", reason, status
    if status == 400:
        params = sequence.request.params
        output.error_param = next((name for name in MASKS if getattr(params, name)), None)
        output.error_code = "no_token_left"
    return output


def take_tokens(sequence: Sequence, sampled: SampledTokens, max_model_len: int) -> TokenOutput:
    """Append the tokens one by one, up to the one that ends the sequence: it has a finish reason
    then."""
    taken: list[int] = []
    output = output_of(sequence, taken)
    for token in sampled.token_ids:
        sequence.token_ids.append(token)
        sequence.unsent_tokens.append(token)
        taken.append(token)
        output.finish_reason, output.stop_reason = sequence.finish_reason(token, max_model_len)
        if output.finish_reason is not None:
            break
    if sampled.logprobs is not None:
        output.logprobs = sampled.logprobs[: len(taken)]
    return output


def vector_of(sequence: Sequence, data: bytes) -> TokenOutput:
    """The only one of a sequence that is pooled."""
    output = output_of(sequence, [])
    output.vector, output.finish_reason = data, "stop"
    return output
