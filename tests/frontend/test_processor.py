"""Requests in, texts out, with no engine: the state machine alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_di.components.messages import SamplingParams, TokenLogprobs, TokenOutput
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.errors import RequestError
from vllm_di.frontend.processor import Generation, RequestProcessor, Update

TOKENIZER = BytesTokenizer(vocab_size=300)
EOS = 257


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def start(
    params: SamplingParams | None = None,
    prompt: Any = "ab",
    clock: Clock | None = None,
    **options: Any,
) -> Generation:
    processor = RequestProcessor(TOKENIZER, 64, 300, clock=clock or Clock())
    options = {"add_special_tokens": False, **options}
    return processor.start("r", prompt, params or SamplingParams(), **options)


def feed(generation: Generation, text: str | bytes, index: int = 0, **fields: Any) -> Update:
    data = text.encode() if isinstance(text, str) else text
    request = generation.requests[index].request_id
    return generation.feed(TokenOutput(request_id=request, token_ids=list(data), **fields))


# Requests


def test_text_and_token_ids() -> None:
    (request,) = start(prompt="ab").requests
    assert (request.request_id, request.prompt_token_ids) == ("r", [97, 98])
    assert start(prompt="ab", add_special_tokens=True).prompt_token_ids == [256, 97, 98]
    assert start(prompt=(1, 2)).prompt_token_ids == [1, 2]
    assert start(prompt=[1, 2]).prompt is None


def test_n_is_fanned_out_with_seeds_that_wrap() -> None:
    generation = start(SamplingParams(n=3, seed=2**63 - 2), priority=3, cache_salt="s")
    assert [r.request_id for r in generation.requests] == ["r-0", "r-1", "r-2"]
    assert [r.params.seed for r in generation.requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert {r.params.n for r in generation.requests} == {1}
    assert {(r.priority, r.cache_salt) for r in generation.requests} == {(3, "s")}


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ("x" * 64, SamplingParams(), "prompt"),
        ("x" * 99, SamplingParams(max_tokens=None), "prompt"),
        ("x" * 60, SamplingParams(max_tokens=5), "max_tokens"),
        ("x" * 60, SamplingParams(max_tokens=None, min_tokens=5), "min_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_figures(
    prompt: str, params: SamplingParams, param: str
) -> None:
    with pytest.raises(RequestError, match=rf"context is 64 .* {len(prompt)} ") as error:
        start(params, prompt)
    assert (error.value.param, error.value.code) == (param, "context_length_exceeded")


def test_max_tokens_defaults_to_what_fits() -> None:
    assert start(SamplingParams(max_tokens=None), "x" * 60).params.max_tokens == 4
    assert start(SamplingParams(max_tokens=4), "x" * 60).params.max_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ("", SamplingParams(), "prompt"),
        ([], SamplingParams(), "prompt"),
        ([300], SamplingParams(), "prompt"),
        ([-1, 5], SamplingParams(), "prompt"),
        ("x", SamplingParams(stop_token_ids=[300]), "stop_token_ids"),
        ("x", SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        ("x", SamplingParams(allowed_token_ids=[2**40]), "allowed_token_ids"),
    ],
)
def test_ids_outside_the_vocabulary_and_empty_prompts(
    prompt: Any, params: SamplingParams, param: str
) -> None:
    with pytest.raises(RequestError) as error:
        start(params, prompt)
    assert error.value.param == param


def test_bad_words_with_and_without_a_space() -> None:
    (request,) = start(SamplingParams(bad_words=["no", " no", "é"])).requests
    words = ["no", " no", "é", " é"]
    assert request.bad_words_token_ids == [list(w.encode()) for w in words]


# Outputs


def test_deltas_and_result() -> None:
    clock = Clock()
    generation = start(SamplingParams(max_tokens=4), clock=clock)
    clock.now += 1.0
    first = feed(generation, "h", queue_time=0.25, num_cached_tokens=1)
    assert (first.text, first.token_ids, first.finish_reason) == ("h", [104], None)
    assert generation.intervals("r") == (1.0, None)
    clock.now += 0.5
    half = feed(generation, b"\xc3")
    assert (half.text, half.token_ids) == ("", [0xC3])
    assert generation.intervals("r") == (None, 0.5)
    clock.now += 0.5
    last = feed(generation, b"\xa9", finish_reason="length")
    assert (last.text, last.finish_reason, last.abort) == ("é", "length", False)
    assert generation.finished
    output = generation.result()
    (text,) = output.outputs
    assert (text.text, text.token_ids, text.finish_reason) == ("hé", [104, 195, 169], "length")
    assert (text.logprobs, text.cumulative_logprob) == (None, None)
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("ab", [97, 98], True)
    assert output.num_cached_tokens == 1
    metrics = output.metrics
    assert metrics.time_in_queue == 0.25
    assert metrics.first_token_time == pytest.approx(metrics.arrival_time + 1.0)
    assert metrics.finished_time == pytest.approx(metrics.arrival_time + 2.0)
    times = generation.times("r")
    assert (times.end_to_end, times.queue, times.prefill, times.decode) == (2.0, 0.25, 0.75, 1.0)
    assert (times.num_prompt_tokens, times.num_generated_tokens, times.n) == (2, 3, 1)


def test_a_text_that_ends_inside_a_character_shows_it_broken() -> None:
    generation = start()
    assert feed(generation, b"\xf0\x9f", finish_reason="length").text == "\ufffd"


def test_stop_string_over_several_outputs() -> None:
    generation = start(SamplingParams(stop=["END"]))
    assert feed(generation, "aE").text == "a"
    assert feed(generation, "N").text == ""
    last = feed(generation, "Dxyz")
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "END")
    assert last.abort, "the engine does not know yet"
    assert last.token_ids == [68], "tokens after the stop string are not part of the answer"
    late = feed(generation, "more", finish_reason="length")
    assert (late.text, late.token_ids, late.finish_reason) == ("", [], None)
    assert generation.result().outputs[0].text == "a"
    assert generation.num_generated_tokens == 4


def test_a_held_back_text_is_shown_at_the_end() -> None:
    generation = start(SamplingParams(stop=["END"]))
    assert feed(generation, "aEN").text == "a"
    last = feed(generation, "", finish_reason="length")
    assert (last.text, last.finish_reason, last.abort) == ("EN", "length", False)


def test_a_stop_string_in_the_last_output_needs_no_abort() -> None:
    generation = start(SamplingParams(stop=["b"], include_stop_str_in_output=True))
    last = feed(generation, "abc", finish_reason="length")
    assert (last.text, last.finish_reason, last.stop_reason) == ("ab", "stop", "b")
    assert not last.abort


def test_stop_strings_wait_for_min_tokens() -> None:
    generation = start(SamplingParams(stop=["a"], min_tokens=3))
    assert feed(generation, "aaa").text == "aaa"
    assert feed(generation, "ba").text == "b"
    assert generation.finished


def test_the_stop_token_has_no_text_unless_wanted() -> None:
    for include, text in [(False, "x"), (True, "xy")]:
        params = SamplingParams(stop_token_ids=[121], include_stop_str_in_output=include)
        generation = start(params)
        last = feed(generation, "xy", finish_reason="stop", stop_reason=121)
        assert (last.text, last.token_ids, last.stop_reason) == (text, [120, 121], 121)


def test_special_tokens() -> None:
    ids = bytes([120])
    for skip, text in [(True, "x"), (False, "x</s>")]:
        generation = start(
            SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=True)
        )
        output = TokenOutput(request_id="r", token_ids=[*ids, EOS], finish_reason="stop")
        assert generation.feed(output).text == text


def test_logprobs() -> None:
    generation = start(SamplingParams(logprobs=1, prompt_logprobs=0))
    entries = [TokenLogprobs([97, 98], [-2.0, -0.5], 5), TokenLogprobs([98, 98], [-0.5, -0.5], 1)]
    prompt = [TokenLogprobs([98], [-3.0], 7)]
    update = feed(
        generation, "ab", logprobs=entries, prompt_logprobs=prompt, finish_reason="length"
    )
    assert update.logprobs == entries
    output = generation.result()
    (text,) = output.outputs
    assert text.cumulative_logprob == -2.5
    assert text.logprobs is not None
    first, second = text.logprobs
    assert list(first) == [97, 98]
    assert (first[97].logprob, first[97].rank, first[97].decoded_token) == (-2.0, 5, "a")
    assert (first[98].logprob, first[98].rank) == (-0.5, 1)
    assert (list(second), second[98].rank) == ([98], 1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] is not None
    assert output.prompt_logprobs[1][98].rank == 7


def test_texts_of_one_request_do_not_mix() -> None:
    generation = start(SamplingParams(n=2, stop=["."]))
    feed(generation, "one", 0)
    feed(generation, "two.", 1)
    assert not generation.finished
    feed(generation, "!", 0, finish_reason="length")
    assert generation.finished
    assert [(o.text, o.finish_reason) for o in generation.result().outputs] == [
        ("one!", "length"),
        ("two", "stop"),
    ]


def test_an_error_of_the_engine_is_raised() -> None:
    generation = start()
    with pytest.raises(RequestError, match="NaN") as error:
        feed(generation, "", finish_reason="error", error="NaN logits", error_code="nan")
    assert (error.value.status, error.value.code) == (500, "nan")
    assert generation.finished
    assert generation.times("r").finish_reason == "error"


@settings(max_examples=150, deadline=None)
@given(
    chunks=st.lists(st.binary(max_size=6), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_deltas_add_up_to_the_result(chunks: list[bytes], stops: list[str]) -> None:
    generation = start(SamplingParams(stop=stops))
    updates = [feed(generation, chunk) for chunk in chunks]
    updates.append(feed(generation, b"", finish_reason="length"))
    (text,) = generation.result().outputs
    assert "".join(u.text for u in updates) == text.text
    assert [i for u in updates for i in u.token_ids] == text.token_ids
    assert sum(u.finish_reason is not None for u in updates) == 1
    if not any(stop in TOKENIZER.decode(list(b"".join(chunks))) for stop in stops):
        assert text.text == TOKENIZER.decode(list(b"".join(chunks)))
