"""Two features that the engine does not ship, added by components alone: docs/growth.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.growth.parts import MEETING

from vllm_di import LLM, SamplingParams
from vllm_di.errors import RequestError

TINY = ["platform=cpu", "model=tiny", "model.dtype=float32", "ops=torch", "trust=[tests]"]
PARTS = "tests.growth.parts"
DRAFTS = [f"drafter._target_={PARTS}.PromptLookup"]
MASKS = [
    "structured_output=none",
    f"structured_output._target_={PARTS}.TokenChoice",
    f"sampler._target_={PARTS}.MaskingSampler",
    f"program._target_={PARTS}.MeetingProgram",
]
PROMPTS = ["abcabcabcab", "one two one two one", "x", "\n\n\n\n\n\n\n\n"]
CHOICES = [[70, 71, 72, 73], [70, 71, 80], [90]]


def tokens(overrides: list[str], *params: SamplingParams, meet: bool = False) -> list[list[int]]:
    with LLM(overrides=[*TINY, *overrides]) as llm:
        MEETING.on = meet  # not in the warm-up, which samples nothing
        texts = [text for text in PROMPTS for _ in params]
        done = llm.generate(texts, [*params] * len(PROMPTS))
        return [list(one.outputs[0].token_ids) for one in done]


@pytest.fixture(autouse=True)
def no_meeting() -> Iterator[None]:
    MEETING.steps = 0
    yield
    MEETING.on = False


def test_drafts_from_the_prompt_change_no_token() -> None:
    few: dict[str, Any] = {
        "allowed_token_ids": [65, 66],
        "ignore_eos": True,
        "max_tokens": 40,
    }  # so they repeat
    asked = [
        SamplingParams(temperature=0, **few),
        SamplingParams(temperature=0.9, seed=7, top_p=0.9, **few),
    ]
    counted = [f"program._target_={PARTS}.MeetingProgram"]
    alone = tokens(counted, *asked)
    before, MEETING.steps = MEETING.steps, 0
    assert tokens([*counted, *DRAFTS], *asked) == alone
    assert 0 < MEETING.steps < before, "no draft proved right"


def test_a_mask_is_worked_out_while_the_model_runs() -> None:
    chosen = SamplingParams(
        temperature=1.0, seed=3, max_tokens=9, structured_output={"token_ids": CHOICES}
    )
    free = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    found = tokens(MASKS, chosen, free, meet=True)
    assert MEETING.steps >= 3  # each of which met, or the barrier had broken
    assert all(one in [[*choice, 257] for choice in CHOICES] for one in found[::2])
    assert found[1::2] == tokens([], free)


def test_masks_follow_drafts() -> None:
    choice = SamplingParams(
        temperature=1.0, seed=3, max_tokens=9, structured_output={"token_ids": CHOICES}
    )
    assert tokens([*MASKS, *DRAFTS], choice) == tokens(MASKS, choice)


def test_a_request_that_the_component_cannot_honour_is_refused() -> None:
    params = SamplingParams(structured_output={"regex": "a+"})
    with pytest.raises(RequestError, match="expected"):
        tokens(MASKS, params)
