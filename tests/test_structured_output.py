"""Answers follow their grammar through the whole engine, however a step is cut or split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.containers.two_platforms import config_dir

from vllm_di import LLM, SamplingParams

TINY = ["platform=cpu", "model.dtype=float32", "trust=[tests]"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z ]{0,9}$"},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 2},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
BOUNDED = {**SCHEMA, "properties": {**SCHEMA["properties"]}}  # type: ignore[dict-item]
BOUNDED["properties"]["ages"] = {  # type: ignore[index]
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 120},
    "maxItems": 2,
}
PROMPTS = ["a", "The quick brown fox " * 9, "x" * 70, "Hello there", "b" * 33]
ASKED: list[dict[str, Any] | None] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": BOUNDED}}},
    {"structured_outputs": {"regex": "[a-f]{3,40}[0-9]{4}"}},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps, perhaps not"]}},
    None,
    {"structured_outputs": {"grammar": 'root ::= "(" root ")" | [0-9]{12}'}},
]
VARIANTS = [
    ["scheduler.max_num_batched_tokens=16", "scheduler.max_num_seqs=3"],
    ["drafter._target_=tests.growth.parts.PromptLookup"],
    ["executor=multiprocess", "executor.tensor_parallel_size=2"],
    ["platform=two"],  # a pipeline of two stages
    ["ops=torch", "attention=sdpa"],
]


def answers(overrides: list[str], folder: Path | None = None) -> list[tuple[str, str | None]]:
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=90, structured_output=asked)
        for i, asked in enumerate(ASKED)
    ]
    folders = [config_dir(folder)] if folder else []
    with LLM("tiny", overrides=[*TINY, *overrides], config_dirs=folders) as llm:
        done = llm.generate(PROMPTS, params)
        return [(one.outputs[0].text, one.outputs[0].finish_reason) for one in done]


@pytest.fixture(scope="module")
def plain() -> list[tuple[str, str | None]]:
    return answers([])


def test_each_answer_follows_its_grammar(plain: list[tuple[str, str | None]]) -> None:
    assert {reason for (_, reason), asked in zip(plain, ASKED, strict=True) if asked} == {"stop"}
    found = json.loads(plain[0][0])
    assert set(found) == {"name", "kind", "ages"}
    assert found["kind"] in ("cat", "dog")
    assert all(0 <= age <= 120 for age in found["ages"])
    assert plain[2][0] in ("yes", "no", "perhaps, perhaps not")
    assert plain[4][0].strip("()").isdigit()


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_however_the_steps_are_cut(
    overrides: list[str], plain: list[tuple[str, str | None]], tmp_path: Path
) -> None:
    assert answers(overrides, tmp_path) == plain


def test_a_preempted_answer_goes_on_where_it_was() -> None:
    regex = {"structured_outputs": {"regex": "([a-f]{5}-){16}[0-9]"}}
    params = [SamplingParams(seed=i, max_tokens=100, structured_output=regex) for i in range(6)]
    found, preemptions = [], []
    for blocks in (200, 14):
        small = [
            f"worker.num_blocks={blocks}",
            "kv_layout.block_size=16",
            "model.max_model_len=160",
        ]
        with LLM("tiny", overrides=[*TINY, *small]) as llm:
            found.append([one.outputs[0].text for one in llm.generate(["x"] * 6, params)])
            preemptions.append(llm.engine.step().stats.num_preemptions)
    assert preemptions[0] == 0 < preemptions[1]
    assert found[0] == found[1]
    assert all(len(text) == 97 for text in found[0])


def test_it_goes_with_other_parameters() -> None:
    regex = {"structured_outputs": {"regex": "[ab]{6}c"}}
    many: dict[str, Any] = {"max_tokens": 20, "structured_output": regex}
    with LLM("tiny", overrides=TINY) as llm:
        several = llm.generate("x", SamplingParams(n=4, seed=1, logprobs=3, **many))[0].outputs
        assert len({one.text for one in several}) > 1
        for one in several:
            assert len(one.text) == 7
            assert one.finish_reason == "stop"
            assert one.logprobs is not None
            assert len(one.logprobs) == len(one.token_ids)
        (cut,) = llm.generate("x", SamplingParams(stop=["c"], seed=1, **many))[0].outputs
        assert set(cut.text) <= {"a", "b"}
        assert cut.stop_reason == "c"
        (odd,) = llm.generate("x", SamplingParams(logit_bias={97: -100.0}, seed=1, **many))[
            0
        ].outputs
        assert odd.text == "bbbbbbc"
        (even,) = llm.generate("x", SamplingParams(presence_penalty=2.0, temperature=0, **many))[
            0
        ].outputs
        assert len(even.text) == 7
        (short,) = llm.generate("x", SamplingParams(**{**many, "max_tokens": 3}))[0].outputs
        assert short.finish_reason == "length"
        (scored,) = llm.generate("xy", SamplingParams(prompt_logprobs=1, **many))
        assert scored.outputs[0].text.endswith("c")


def test_a_hostile_grammar_ends_its_request_alone() -> None:
    from vllm_di.errors import RequestError

    canary = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    overrides = [*TINY, "structured_output.max_lexer_states=300"]
    with LLM("tiny", overrides=overrides) as llm:
        before = llm.generate("canary", canary)[0].outputs[0].token_ids
        nasty = {"structured_outputs": {"regex": "([ab]*a[ab]{50}){5}"}}
        with pytest.raises(RequestError, match="too complex") as caught:
            llm.generate("x", SamplingParams(seed=1, max_tokens=400, structured_output=nasty))
        assert caught.value.status == 400
        assert llm.generate("canary", canary)[0].outputs[0].token_ids == before


@pytest.mark.slow
def test_two_hundred_answers_of_a_real_model_are_valid() -> None:
    """At temperature 1, by the demo's model, with a schema whose strings and arrays are bounded."""
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": BOUNDED}}}
    params = SamplingParams(temperature=1.0, max_tokens=160, structured_output=asked)
    ends = {"stop": 0, "length": 0}
    with LLM(overrides=["platform=cpu"]) as llm:
        for one in llm.generate([f"Describe pet number {i} as JSON:" for i in range(200)], params):
            (output,) = one.outputs
            ends[str(output.finish_reason)] += 1
            if output.finish_reason == "stop":
                found = json.loads(output.text)
                assert set(found) == {"name", "kind", "ages"}
                assert len(found["name"]) <= 9
                assert found["kind"] in ("cat", "dog")
                assert len(found["ages"]) <= 2
                assert all(0 <= age <= 120 for age in found["ages"])
    assert ends["stop"] + ends["length"] == 200
    assert ends["length"] == 0, ends
