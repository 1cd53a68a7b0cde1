"""One request from prompt to text, as a state machine without I/O. The server and the ``LLM``
class both use it:

    processor = RequestProcessor(tokenizer, report.max_model_len, report.vocab_size)
    generation = processor.start("r1", "Once upon", SamplingParams(n=2))
    for request in generation.requests:
        engine.add(request)
    ...
    update = generation.feed(output)      # a TokenOutput of one of its requests
    if update.abort:                      # a stop string ended this choice
        engine.abort(update.request_id)
    if generation.finished:
        print(generation.result().outputs[0].text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from vllm_di.components.interfaces import RequestTimes, Tokenizer
from vllm_di.components.messages import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from vllm_di.frontend.detokenizer import Detokenizer, StopStrings
from vllm_di.frontend.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    position_logprobs,
)
from vllm_di.frontend.requests import (
    Prepared,
    check_token_ids,
    encode_prompt,
    failure,
    fan_out,
    fitted,
    prepared,
)


class Update(msgspec.Struct, kw_only=True):
    """What one output of the engine added to one choice."""

    request_id: str
    """The engine request's id."""
    index: int
    text: str = ""
    """New text. It may lag behind the tokens: an incomplete character, or text that may become a
    stop string, is held back."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """With the first update, where the request asks for them."""
    num_cached_tokens: int = 0
    abort: bool = False
    """A stop string ended the choice: the caller must abort the request in the engine."""


class RequestProcessor:
    """Starts generations. Holds the tokenizer and the limits of one engine."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        vocab_size: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._clock = clock

    def prepare(self, params: SamplingParams) -> Prepared:
        """Check parameters that several prompts share. Raises RequestError."""
        return prepared(self.tokenizer, params, self.vocab_size)

    def start(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | Prepared,
        *,
        add_special_tokens: bool = True,
        priority: int = 0,
        cache_salt: str | None = None,
        default_max_tokens: int | None = None,
    ) -> Generation:
        """Check a request and create its engine requests. Raises RequestError, without side
        effects. May be called in a thread, for a long prompt.

        ``default_max_tokens`` is used where ``params`` set no maximum, and is limited to the room
        that the context has left."""
        started = self._clock()
        ids = encode_prompt(self.tokenizer, prompt, add_special_tokens=add_special_tokens)
        if isinstance(params, SamplingParams):
            params = self.prepare(params)
        fitted_params = fitted(params.params, len(ids), self.max_model_len, default_max_tokens)
        check_token_ids(ids, self.vocab_size, "prompt")
        arrival = time.time()
        requests = fan_out(
            request_id,
            ids,
            fitted_params,
            params.bad_words_token_ids,
            priority=priority,
            cache_salt=cache_salt,
            arrival_time=arrival,
        )
        text = prompt if isinstance(prompt, str) else None
        return Generation(self, request_id, text, fitted_params, requests, self._clock, started)


class Generation:
    """One request while it runs. ``feed`` it the engine's outputs until ``finished``."""

    def __init__(
        self,
        processor: RequestProcessor,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        requests: list[EngineRequest],
        clock: Callable[[], float],
        started: float,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = requests[0].prompt_token_ids
        self.params = params
        self.requests = requests
        """To be added to the engine."""
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.num_cached_tokens = 0
        self._processor = processor
        self._clock = clock
        self._started = started
        self._sequences = {
            request.request_id: _Sequence(processor.tokenizer, request, i)
            for i, request in enumerate(requests)
        }
        self._num_open = len(requests)

    @property
    def finished(self) -> bool:
        return self._num_open == 0

    @property
    def num_generated_tokens(self) -> int:
        """Of all choices."""
        return sum(len(s.token_ids) for s in self._sequences.values())

    def feed(self, output: TokenOutput) -> Update:
        """Take one output. An output after the end of its choice gives an empty update.

        Raises RequestError when the engine failed on this request; the caller must then abort the
        others of ``requests``.
        """
        sequence = self._sequences[output.request_id]
        if output.finish_reason == "error":
            self._num_open -= sequence.finish_reason is None
            sequence.finish_reason = "error"
            raise failure(output)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if sequence.finish_reason is not None:
            return Update(request_id=output.request_id, index=sequence.index)
        update = sequence.feed(output, self._clock())
        if update.finish_reason is not None:
            self._num_open -= 1
        return update

    def result(self) -> RequestOutput:
        """The result so far, in the form of the ``LLM`` class."""
        tokenizer = self._processor.tokenizer
        first = next(iter(self._sequences.values()))
        ends = [s.last_token_at for s in self._sequences.values() if s.last_token_at is not None]
        arrival = self.requests[0].arrival_time
        to_epoch = arrival - self._started
        prompt_logprobs = None
        if self.prompt_logprobs is not None:
            positions = [position_logprobs(tokenizer, p) for p in self.prompt_logprobs]
            prompt_logprobs = [None, *positions]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[s.result(tokenizer) for s in self._sequences.values()],
            finished=self.finished,
            metrics=RequestMetrics(
                arrival_time=arrival,
                first_token_time=_shifted(first.first_token_at, to_epoch),
                last_token_time=_shifted(max(ends, default=None), to_epoch),
                finished_time=_shifted(max(ends, default=None), to_epoch)
                if self.finished
                else None,
                time_in_queue=first.queue_time,
            ),
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
        )

    def intervals(self, request_id: str) -> tuple[float | None, float | None]:
        """For the last ``feed`` of one request, in seconds: the time to its first token, and the
        time since its previous output. The one that does not apply is None."""
        sequence = self._sequences[request_id]
        if sequence.last_interval is not None:
            return None, sequence.last_interval
        first = sequence.first_token_at
        return (None if first is None else first - self._started), None

    def times(self, request_id: str) -> RequestTimes:
        """Token counts and durations of one finished choice, for metrics."""
        sequence = self._sequences[request_id]
        now = self._clock()
        first = now if sequence.first_token_at is None else sequence.first_token_at
        last = now if sequence.last_token_at is None else sequence.last_token_at
        return RequestTimes(
            finish_reason=sequence.finish_reason or "abort",
            num_prompt_tokens=len(self.prompt_token_ids),
            num_generated_tokens=len(sequence.token_ids),
            max_tokens=self.params.max_tokens,
            n=self.params.n,
            end_to_end=now - self._started,
            queue=sequence.queue_time,
            prefill=max(0.0, first - self._started - sequence.queue_time),
            decode=last - first,
        )


class _Sequence:
    """One choice of a generation."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest, index: int) -> None:
        params = request.params
        self.request_id = request.request_id
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.last_interval: float | None = None
        self.queue_time = 0.0
        self._texts: list[str] = []
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._has_stops = bool(params.stop)
        self._stops = StopStrings(params.stop, include=self._include_stop)
        self._detokenizer = Detokenizer(
            tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )

    def feed(self, output: TokenOutput, now: float) -> Update:
        self.queue_time = self.queue_time or output.queue_time
        if output.token_ids:
            self._record_time(now)
        reason, stopped, shown, count = output.finish_reason, None, "", 0
        if reason is None and not self._has_stops:
            count = len(output.token_ids)
            shown = "".join([self._detokenizer.add(token_id) for token_id in output.token_ids])
            return self._update(output, shown, count, None)
        silent_end = reason == "stop" and not self._include_stop
        for count, token_id in enumerate(output.token_ids, 1):
            is_silent = silent_end and count == len(output.token_ids)
            new = "" if is_silent else self._detokenizer.add(token_id)
            text, stopped = self._search(new, len(self.token_ids) + count)
            shown += text
            if stopped is not None:
                break
        if reason is not None and stopped is None:
            text, stopped = self._search(self._detokenizer.flush(), len(self.token_ids) + count)
            shown += text + ("" if stopped is not None else self._stops.flush())
        return self._update(output, shown, count, stopped)

    def _update(self, output: TokenOutput, shown: str, count: int, stopped: str | None) -> Update:
        """Keep the first ``count`` tokens of an output and what they show."""
        reason = output.finish_reason
        token_ids = output.token_ids[:count]
        logprobs = None if output.logprobs is None else output.logprobs[:count]
        self.token_ids += token_ids
        if self.logprobs is not None:
            self.logprobs += logprobs or []
        self._texts.append(shown)
        self.finish_reason = "stop" if stopped is not None else reason
        self.stop_reason = stopped if stopped is not None else output.stop_reason
        return Update(
            request_id=self.request_id,
            index=self.index,
            text=shown,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            prompt_logprobs=output.prompt_logprobs,
            num_cached_tokens=output.num_cached_tokens,
            abort=stopped is not None and reason is None,
        )

    def result(self, tokenizer: Tokenizer) -> CompletionOutput:
        logprobs = self.logprobs
        return CompletionOutput(
            index=self.index,
            text="".join(self._texts),
            token_ids=self.token_ids,
            cumulative_logprob=None if logprobs is None else sum(p.logprobs[0] for p in logprobs),
            logprobs=None
            if logprobs is None
            else [position_logprobs(tokenizer, p) for p in logprobs],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _search(self, new: str, num_tokens: int) -> tuple[str, str | None]:
        """Stop strings are searched only in text after the first ``min_tokens`` tokens."""
        if num_tokens <= self._min_tokens:
            return self._stops.flush() + new, None
        return self._stops.add(new)

    def _record_time(self, now: float) -> None:
        if self.last_token_at is None:
            self.first_token_at = now
        else:
            self.last_interval = now - self.last_token_at
        self.last_token_at = now


def _shifted(value: float | None, offset: float) -> float | None:
    return None if value is None else value + offset
