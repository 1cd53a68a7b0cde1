"""Thoughts before answers: a budget closes them at its token, and a grammar waits for their end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.components.structured_output.test_llguidance import EOS, VOCAB, part

from vllm_di.components.interfaces import MaskTask
from vllm_di.components.messages import SamplingParams
from vllm_di.components.structured_output.llguidance import LlguidanceOutput
from vllm_di.components.structured_output.none import NoStructuredOutput
from vllm_di.components.structured_output.thinking import Closings
from vllm_di.components.structured_output.thought import Thought
from vllm_di.errors import RequestError

OPEN, CLOSE = "<think>", "</think>"
DIGITS = {"structured_outputs": {"regex": "[0-9]{2}"}}


def thought(begins: str = "inside", budget: int | None = None, opens: bool = False) -> Any:
    return msgspec.to_builtins(
        Thought(
            begins=begins,  # type: ignore[arg-type]
            opening=[OPEN],
            closing=[CLOSE],
            opening_ids=[[*OPEN.encode()]] if opens else [],
            closing_ids=[*CLOSE.encode()],
            budget=budget,
        )
    )


class Row:
    """A sequence that asks for its masks as the sampler does."""

    def __init__(self, asked: dict[str, Any], made_by: LlguidanceOutput | None = None) -> None:
        self.part = made_by or part()
        self.params = SamplingParams(structured_output=asked)
        self.part.check(self.params)
        self.place = self.part.start(self.params, vocab_size=VOCAB, eos_token_ids=[EOS])

    def allowed(self, new: Sequence[int] = (), drafts: Sequence[int] = ()) -> list[set[int]]:
        """The tokens that may come, after ``new`` and after each of the drafts."""
        masks = np.zeros((1 + len(drafts), -(-VOCAB // 32)), np.uint32)
        task = MaskTask(self.place, new, drafts, masks)
        self.part.fill([task])
        assert task.error is None
        bits = np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")[:, :VOCAB]
        return [{*np.flatnonzero(row).tolist()} for row in bits]

    def text(self, wanted: str, seed: int = 0) -> str:
        """Writes what it wants where it may, else what comes first of the allowed."""
        data, out, new = [*wanted.encode()], b"", [0][:0]
        for _ in range(200):
            (may,) = self.allowed(new)
            token = data.pop(0) if data and data[0] in may else EOS if EOS in may else min(may)
            if token == EOS:
                return out.decode()
            out, new = out + bytes([token]), [token]
        raise AssertionError(out)


def test_a_budget_closes_the_thought_and_the_answer_is_free() -> None:
    row = Row({"thought": thought(budget=3)})
    for token in b"abc":
        (may,) = row.allowed([] if token == ord("a") else [token - 1])
        assert may >= {*range(VOCAB)}
    after = ord("c")
    for token in CLOSE.encode():
        assert row.allowed([after]) == [{token}]
        after = token
    assert row.allowed([after])[0] >= {*range(VOCAB)}
    assert row.allowed([*b"x </think>"])[0] >= {*range(VOCAB)}


@pytest.mark.parametrize(
    ("begins", "head", "budget"),
    [
        *(("inside", "", budget) for budget in (0, 1, 2, 5, 30)),
        *(("before", OPEN, budget) for budget in (0, 1, 2, 5, 30)),
        ("inside", f"\n{OPEN}", 30),
    ],
)
def test_the_budget_counts_what_stands_between_the_marks(
    begins: str, head: str, budget: int
) -> None:
    row = Row({"thought": thought(begins, budget)})
    wanted = [*(head + "a" * 100).encode()]
    written, new = b"", [0][:0]
    while not written.endswith(CLOSE.encode()):
        (may,) = row.allowed(new)
        token = wanted[len(written)] if len(may) > 1 else min(may)
        written, new = written + bytes([token]), [token]
    assert written.decode() == head + "a" * budget + CLOSE


def test_a_thought_that_closes_itself_in_time_is_left_alone() -> None:
    row = Row({"thought": thought(budget=20)})
    assert row.allowed([*b"so</think>", *b"answer " * 20])[0] >= {*range(VOCAB)}
    none = Row({"thought": thought("before", budget=2)})
    assert none.allowed([*b"There is no thought here."])[0] >= {*range(VOCAB)}


def test_a_grammar_begins_behind_the_thought() -> None:
    assert Row({**DIGITS, "thought": thought()}).text("hm 12 </think>34") == "hm 12 </think>34"
    assert Row({**DIGITS, "thought": thought(budget=2)}).text("hm") == "hm</think>00"


def test_an_answer_may_open_a_thought_or_begin_with_its_grammar() -> None:
    asked = {**DIGITS, "thought": thought("before", opens=True)}
    assert Row(asked).text("56") == "56"
    assert Row(asked).text("<think>7</think>8") == "<think>7</think>80"
    row = Row(asked)
    assert row.allowed() == [{*b"0123456789<"}]
    assert row.allowed([*b"<"]) == [{ord("t")}], "an opening that has begun is completed"
    never = {**DIGITS, "thought": thought("before")}
    assert Row(never).allowed() == [{*b"0123456789"}]


def test_an_opening_that_the_grammar_allows_is_the_grammars() -> None:
    html = {"structured_outputs": {"regex": "<b>x</b>"}}
    row = Row({**html, "thought": thought("before", opens=True)})
    assert row.text("<b>x</b>") == "<b>x</b>"


def test_a_thought_before_a_grammar_cannot_end_the_answer() -> None:
    (may,) = Row({**DIGITS, "thought": thought()}).allowed()
    assert may >= {*range(VOCAB)} - {EOS}
    assert EOS not in may
    (free,) = Row({"thought": thought()}).allowed()
    assert EOS in free


def test_tokens_that_would_run_over_the_closing_mark_cannot_come() -> None:
    tokens = [b"</think>", b"</think> 1", b">", b">1", b"> \n", b"x>1", b"nk", b"</th", b"<"]
    closings = Closings(tokens, [CLOSE, "[/T]"])
    assert closings.overrunning(closings.begun(b"well")) == [1]
    assert closings.overrunning(closings.begun(b"well </think")) == [1, 3]
    assert closings.begun(b"a < b </thi") == b"</thi"
    assert closings.begun(b"a [/") == b"[/"
    assert closings.rest(b"a</think>b[/T]c") == b"b[/T]c"
    assert closings.rest(b"a</think") is None


ASKED: list[dict[str, Any]] = [
    {"thought": thought(budget=3)},
    {"thought": thought("before", budget=4)},
    {**DIGITS, "thought": thought()},
    {**DIGITS, "thought": thought(budget=2)},
    {**DIGITS, "thought": thought("before", opens=True)},
    {**DIGITS, "thought": thought("before", budget=1, opens=True)},
]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_drafts_and_replays_give_the_masks_of_single_steps(
    asked: dict[str, Any], seed: int
) -> None:
    """A random walk, token by token, beside guesses of what follows and a second beginning."""
    random_ = random.Random(seed)
    made_by = part()
    walk, masks, row = [0][:0], [{0}][:0], Row(asked, made_by)
    wanted = [*random_.choice([b"<think>ab</think>12", b"ab</think>12", b"12", b"</th</think>9"])]
    for _ in range(30):
        masks += row.allowed(walk[-1:])
        may = masks[-1]
        if not may - {EOS}:
            break
        likely = wanted[len(walk)] if len(walk) < len(wanted) else random_.randrange(256)
        walk.append(likely if likely in may else random_.choice(sorted(may - {EOS})))
    for at in range(0, len(walk), 3):
        guesses = walk[at : at + random_.randrange(1, 25)]
        if at + len(guesses) >= len(masks):
            guesses = guesses[: len(masks) - at - 1]
        again = Row(asked, made_by)
        assert again.allowed(walk[:at], guesses) == masks[at : at + len(guesses) + 1]
        assert again.allowed(guesses) == [masks[at + len(guesses)]], "after they proved right"
        wrong = Row(asked, made_by)
        assert wrong.allowed(walk[:at], [256, 0])[0] == masks[at]
        assert wrong.allowed(walk[at : at + 1])[0] == masks[min(at + 1, len(masks) - 1)]


def test_what_is_no_thought_is_refused() -> None:
    with pytest.raises(RequestError, match="budget"):
        part().check(SamplingParams(structured_output={"thought": {**thought(), "budget": -1}}))
    with pytest.raises(RequestError, match="do not write"):
        Row({"thought": {**thought(), "closing_ids": [1, 2]}})


def test_without_masks_a_budget_is_refused() -> None:
    for asked, param in (({}, "thinking_token_budget"), (DIGITS, "structured_outputs")):
        with pytest.raises(RequestError) as caught:
            NoStructuredOutput().check(
                SamplingParams(structured_output={**asked, "thought": thought()})
            )
        assert caught.value.param == param
