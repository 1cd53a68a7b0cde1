"""Masks of tokens (structured output): obeyed by every row that has one, and by no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vllm_di.components.interfaces import Sampler, StructuredOutput
from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.conformance.checks.test_sampler import VOCAB, choose, logits_of, row
from vllm_di.conformance.grammars import Listed
from vllm_di.conformance.outcomes import NotDeclared
from vllm_di.conformance.subject import Subject
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import EngineContainer
from vllm_di.errors import RequestError

EDGES = [0, 31, 32, 63, 64, VOCAB - 1]
"""Tokens at the ends of the words that hold the bits of a mask."""


def need_grammars(subject: Subject) -> None:
    """Raises NotDeclared where the platform's own ``structured_output`` takes none."""
    with opened(EngineContainer, subject.assembly(), only=["structured_output"]) as container:
        part: StructuredOutput = container.structured_output()
        try:
            part.check(SamplingParams(structured_output={"guided_regex": "a"}))
        except RequestError as error:
            raise NotDeclared(f"its structured_output takes no grammars: {error}") from None


@contextmanager
def masking_sampler(subject: Subject) -> Iterator[tuple[Sampler, torch.device]]:
    need_grammars(subject)
    with subject.parts("sampler", "device", structured_output=Listed()) as container:
        yield container.sampler(), container.device().torch_device


def listed(*places: list[int]) -> dict[str, list[list[int]]]:
    return {"listed": [*places]}


@pytest.mark.parametrize("begins", [True, False], ids=["begun", "at once"])
def test_a_row_obeys_its_own_mask_alone(subject: Subject, begins: bool) -> None:
    with masking_sampler(subject) as (sampler, device):
        logits = logits_of(len(EDGES) * 2 + 2, subject.seed)
        sampler.warm_up(logits.clone().to(device))
        rows = [row(i, temperature=0, structured_output=listed([e])) for i, e in enumerate(EDGES)]
        rows += [
            row(10 + i, seed=i, structured_output=listed([e], [7])) for i, e in enumerate(EDGES)
        ]
        rows += [row(20, temperature=0), row(21, temperature=0, allowed_token_ids=[5, 6])]
        if begins:
            sampler.begin(rows, [[] for _ in rows])
        found = choose(sampler, device, logits, rows)
        free = int(logits[-2].argmax())
        limited = 5 if logits[-1, 5] >= logits[-1, 6] else 6
        assert found == [*EDGES, *EDGES, free, limited], "masks were not obeyed, or reached others"


def test_the_likeliest_of_the_allowed_is_chosen(subject: Subject) -> None:
    with masking_sampler(subject) as (sampler, device):
        logits = logits_of(4, subject.seed)
        few = [3, 40, 200, 301]
        rows = [row(i, temperature=0, structured_output=listed(few)) for i in range(4)]
        wanted = [few[int(one[few].argmax())] for one in logits]
        assert choose(sampler, device, logits, rows) == wanted


def test_all_of_the_allowed_are_drawn(subject: Subject) -> None:
    with masking_sampler(subject) as (sampler, device):
        few = [31, 32, 200, 319]
        logits = torch.zeros(1, VOCAB)
        logits[0, 100] = 20.0
        seen: set[int] = set()
        for start in range(0, 200, 50):
            rows = [
                row(start + i, seed=start + i, structured_output=listed(few)) for i in range(50)
            ]
            seen |= set(choose(sampler, device, logits.expand(50, -1), rows))
        assert seen == set(few), f"drew {sorted(seen)} of {few}"


def test_masks_go_on_with_the_answer_and_its_drafts(subject: Subject) -> None:
    with masking_sampler(subject) as (sampler, device):
        logits = logits_of(1, subject.seed)
        sampler.warm_up(logits.clone().to(device))
        own = row(0, temperature=0, structured_output=listed([1], [2], [3], [4]))
        sampler.begin([own], [[1, 2]])
        for place in (1, 2, 3):  # two guesses that prove right, and what follows
            assert choose(sampler, device, logits, [own]) == [place]
            own.token_ids.append(place)
        sampler.begin([own], [[]])
        assert choose(sampler, device, logits, [own]) == [4]
        own.token_ids.append(4)
        assert choose(sampler, device, logits, [own]) == own.eos_token_ids, "the grammar has ended"
        again = row(1, out=[1, 2], temperature=0, structured_output=listed([1], [2], [3]))
        assert choose(sampler, device, logits, [again]) == [3], "after a preemption"


def test_logprobs_are_those_before_the_mask(subject: Subject) -> None:
    with masking_sampler(subject) as (sampler, device):
        logits = logits_of(1, subject.seed)
        own = row(0, temperature=0, logprobs=1, structured_output=listed([9]))
        tokens, failed = sampler.sample(logits.clone().to(device), [own])
        assert not failed
        assert tokens[0].logprobs is not None
        (told,) = tokens[0].logprobs
        exact = logits[0].double().log_softmax(-1)
        assert told.token_ids == [9, int(exact.argmax())]
        assert abs(told.logprobs[0] - float(exact[9])) < 1e-4


def test_a_row_without_any_token_fails_alone(subject: Subject) -> None:
    with masking_sampler(subject) as (sampler, device):
        logits = logits_of(2, subject.seed)
        rows = [
            row(0, temperature=0, structured_output=listed([4]), allowed_token_ids=[5]),
            row(1, temperature=0, structured_output=listed([4])),
        ]
        tokens, failed = sampler.sample(logits.clone().to(device), rows)
        assert set(failed) == {0}
        assert failed[0] in sampler.request_faults
        assert [token.token_ids for token in tokens] == [[4]]


def test_answers_follow_their_grammar(subject: Subject) -> None:
    """Through the engine: several requests, some free, with prompts of several lengths."""
    need_grammars(subject)
    part = Listed()
    places = [[11, 12], [13], [14, 250, 319], [15]]
    with subject.engine(worker={"structured_output": part}, structured_output=part) as engine:
        for i in range(6):
            asked = None if i % 3 == 2 else listed(*places)
            params = SamplingParams(
                temperature=i % 2, seed=i, max_tokens=12, structured_output=asked
            )
            prompt = [(7 * i + k) % 256 for k in range(3 + 20 * i)]
            engine.add(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
        answers: dict[str, list[int]] = {}
        reasons: dict[str, str | None] = {}
        while engine.has_work():
            for output in engine.step().outputs:
                answers.setdefault(output.request_id, []).extend(output.token_ids)
                reasons[output.request_id] = output.finish_reason or reasons.get(output.request_id)
        ends = engine.report.eos_token_ids
    for name in "0134":
        *body, last = answers[name]
        assert reasons[name] == "stop"
        assert len(body) == len(places)
        assert all(token in place for token, place in zip(body, places, strict=True)), answers[name]
        assert last in ends
