"""Constraints as clients write them: taken, or refused with field and place. The masks of one step
beside what the grammar says of each token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from vllm_di.components.interfaces import MaskTask
from vllm_di.components.messages import SamplingParams
from vllm_di.components.structured_output.llguidance import LlguidanceOutput
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.errors import RequestError

VOCAB, EOS = 320, 257


def part(**settings: Any) -> LlguidanceOutput:
    values: dict[str, Any] = {
        "vocabulary": lambda: BytesTokenizer(vocab_size=VOCAB),
        "any_whitespace": False,
        "compile_seconds": 60.0,
        "max_grammar_bytes": 131_072,
        "max_lexer_states": 20_000,
        "cache_bytes": 2**28,
        "threads": 1,
    }
    return LlguidanceOutput(**(values | settings))


def schema(value: Any) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "strict": True, "schema": value},
        }
    }


def refusal(asked: dict[str, Any], **settings: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        part(**settings).check(SamplingParams(structured_output=asked))
    assert caught.value.status == 400
    assert len(caught.value.message) < 1500
    return caught.value


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


TAKEN: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "text"}},
    schema({"type": "object", "properties": {"a": {"type": "integer"}}}),
    schema(True),
    {"structured_outputs": {"json": '{"type": "string"}'}},
    {"structured_outputs": {"json": {"type": "string"}, "regex": None}},
    {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
    {"structured_outputs": {"regex": r"\d{3}-[a-z]+"}},
    {"structured_outputs": {"choice": ["yes", "no", 'q"\n\\']}},
    {"structured_outputs": {"grammar": 'start: "a" | "b" start'}},
    {"structured_outputs": {"grammar": 'root ::= "yes" | [0-9]+'}},
    {"guided_json": {"enum": [1, "two", None]}},
    {"guided_regex": "(a+)+b"},
    {"guided_regex": "((a{1,100}){1,100}){1,100}"},
    {"guided_grammar": 'start: start "a" | "a"'},
    schema(nested(40)),
    schema({"$defs": {"t": {"properties": {"t": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"}),
    schema({"enum": [f"value {i}" for i in range(5000)]}),
]


@pytest.mark.parametrize("asked", TAKEN, ids=lambda a: json.dumps(a)[:60])
def test_it_is_taken(asked: dict[str, Any]) -> None:
    part().check(SamplingParams(structured_output=asked))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_objekt"}}, "response_format", "did you mean 'json_object'"),
    ({"response_format": {}}, "response_format", "expected text"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    (schema([1]), "response_format", "object, got list"),
    (
        schema({"properties": {"a/b": {"items": {"type": "array", "uniqueItems": True}}}}),
        "response_format",
        r"json_schema\.schema: at /properties/a~1b/items: .*uniqueItems",
    ),
    (
        schema({"$defs": {"t": {"anyOf": [{}, {"not": {}}]}}, "$ref": "#/$defs/t"}),
        "response_format",
        r"at /\$defs/t/anyOf/1: .*not",
    ),
    (schema({"type": "strin"}), "response_format", "strin"),
    (schema({"$ref": "#/nope"}), "response_format", "/nope"),
    (schema({"$ref": "http://example.com/x"}), "response_format", "example.com"),
    (schema({"$ref": "#"}), "response_format", "no text fits"),
    (schema(False), "response_format", "not"),
    (
        schema({"properties": {"x": False}, "required": ["x"], "type": "object"}),
        "response_format",
        "x",
    ),
    (schema({"type": "string", "pattern": "(?=a)b"}), "response_format", "look-around"),
    (schema(nested(3000)), "response_format", "deep"),
    (schema({"enum": ["x" * 200_000]}), "response_format", "131,072 bytes"),
    ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
    ({"guided_regex": r"(a)\1"}, "guided_regex", "backreferences"),
    ({"guided_regex": 5}, "guided_regex", "expected a text"),
    ({"guided_choice": []}, "guided_choice", "at least one"),
    ({"guided_choice": ["a", 1]}, "guided_choice", "list of texts"),
    ({"guided_grammar": "hello {"}, "guided_grammar", "neither Lark nor GBNF"),
    ({"guided_grammar": "start: b"}, "guided_grammar", "unknown name"),
    ({"guided_grammar": "root ::= " + "(" * 5000}, "guided_grammar", "deep"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "did you mean 'json'"),
    ({"structured_outputs": {}}, "structured_outputs", "got none"),
    ({"structured_outputs": []}, "structured_outputs", "an object"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "json and regex"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "not supported"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "leave one out"),
    ({"regex": "a"}, "structured_output", "guided_regex"),
]


@pytest.mark.parametrize(
    ("asked", "param", "words"), REFUSED, ids=[words for _, _, words in REFUSED]
)
def test_it_is_refused(asked: dict[str, Any], param: str, words: str) -> None:
    error = refusal(asked)
    assert error.param == param
    assert re.search(words, error.message), error.message


def test_a_grammar_that_compiles_too_long_is_refused() -> None:
    many = schema({"type": "object", "properties": {f"k{i}": {} for i in range(1000)}})
    assert "compile_seconds" in refusal(many, compile_seconds=1e-6).message


def test_ignore_eos_contradicts_it() -> None:
    with pytest.raises(RequestError, match="ignore_eos"):
        part().check(SamplingParams(ignore_eos=True, structured_output={"guided_regex": "a"}))


def test_a_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    one, tries = part(), 0

    def counted(asked: dict[str, Any]) -> None:
        nonlocal tries
        tries += 1

    monkeypatch.setattr(one, "_try", counted)
    for _ in range(3):
        one.check(SamplingParams(structured_output={"guided_regex": "abc"}))
    assert tries == 1


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    assert "pip install llguidance" in refusal({"guided_regex": "a"}).message


# -- masks ----------------------------------------------------------------------------------------


class Answer:
    """One sequence; its masks as sets of tokens."""

    def __init__(self, one: LlguidanceOutput, asked: dict[str, Any]) -> None:
        self.part = one
        params = SamplingParams(structured_output=asked)
        self.place = one.start(params, vocab_size=VOCAB, eos_token_ids=[EOS])

    def task(self, tokens: Sequence[int] = (), drafts: Sequence[int] = ()) -> MaskTask:
        masks = np.zeros((1 + len(drafts), VOCAB // 32), np.uint32)
        return MaskTask(self.place, tokens, drafts, masks)

    def next(self, tokens: Sequence[int] = ()) -> set[int]:
        task = self.task(tokens)
        self.part.fill([task])
        assert task.error is None
        return allowed(task.masks[0])


def allowed(mask: np.ndarray[Any, Any]) -> set[int]:
    return {i for i in range(VOCAB) if mask[i // 32] >> np.uint32(i % 32) & np.uint32(1)}


def test_masks_are_what_the_expression_says() -> None:
    answer = Answer(part(), {"guided_regex": "a[bc]d?"})
    assert answer.next() == {ord("a")}
    assert answer.next([ord("a")]) == {ord("b"), ord("c")}
    assert answer.next([ord("b")]) == {ord("d"), EOS}
    assert answer.next([ord("d")]) == {EOS}


def test_drafts_have_masks_and_are_not_taken_in() -> None:
    one = part()
    plain, drafted = (Answer(one, {"guided_choice": ["abc", "abd"]}) for _ in range(2))
    first, second = plain.task(), drafted.task(drafts=[ord("a"), ord("b"), ord("x")])
    one.fill([first, second])
    found = [allowed(mask) for mask in second.masks]
    assert found == [{ord("a")}, {ord("b")}, {ord("c"), ord("d")}, set()]
    assert allowed(first.masks[0]) == {ord("a")}
    assert drafted.next([ord("a"), ord("b")]) == {ord("c"), ord("d")}


def test_a_free_text_among_them() -> None:
    answer = Answer(part(), {"response_format": {"type": "text"}})
    assert answer.next() == set(range(VOCAB))


def test_a_grammar_that_grows_too_complex_is_an_error_and_no_end() -> None:
    one = part(max_lexer_states=500)
    good, bad = (
        Answer(one, {"guided_regex": "[ab]+"}),
        Answer(one, {"guided_regex": "(.*a.{50}){5}"}),
    )
    rng, task = np.random.default_rng(1), None
    for _ in range(300):
        task = bad.task([int(rng.choice([97, 98]))])
        other = good.task([97])
        one.fill([task, other])
        assert other.error is None
        if task.error is not None:
            break
    assert task is not None
    assert task.error is not None
    assert "too many" in task.error


def test_kept_grammars_are_bounded() -> None:
    one = part(cache_bytes=3 * 20_000 * 8192)
    for i in range(10):
        Answer(one, {"guided_regex": f"a{{{i + 1}}}"})
    assert len(one._kept) == 3
    assert Answer(one, {"guided_regex": "a{1}"}).next() == {97}


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        part().start(
            SamplingParams(structured_output={"guided_regex": "a"}), vocab_size=9, eos_token_ids=[]
        )


def test_white_space() -> None:
    asked = schema({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2})
    strict = Answer(part(), asked)
    assert strict.next(list(b"[1,")) == {ord(" ")}
    free = Answer(part(any_whitespace=True), asked)
    assert {ord("\n"), ord(" "), ord("1")} <= free.next(list(b"[1,"))
    chosen = {"structured_outputs": {"json": [], "disable_any_whitespace": False}}
    chosen["structured_outputs"]["json"] = msgspec.json.decode('{"type": "array"}')
    assert ord("\n") in Answer(part(), chosen).next(list(b"["))
