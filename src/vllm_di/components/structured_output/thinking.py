"""Thoughts before an answer: a budget closes them, and a grammar begins behind them.

A thought is text between two marks. How a model cuts these into tokens is its own choice, so they
are looked for in the bytes of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vllm_di.components.interfaces import MaskTask
from vllm_di.components.structured_output.thought import PARAM, Thought
from vllm_di.errors import RequestError

ALL = np.uint32(0xFFFFFFFF)


class Closings:
    """The closing marks in the bytes of one vocabulary."""

    def __init__(self, tokens: Sequence[bytes], marks: Sequence[str]) -> None:
        """tokens: the bytes of each id."""
        self.tokens, self.marks = tokens, [mark.encode() for mark in marks]
        self._longest = max(map(len, self.marks))
        self._overrunning: dict[bytes, list[int]] = {}
        ends = {mark[-1:] for mark in self.marks}
        self._candidates = [
            i
            for i, data in enumerate(tokens)
            if any(data.partition(end)[2].strip() for end in ends)
        ]

    def rest(self, text: bytes) -> bytes | None:
        """What follows the first closing mark; None without one."""
        found = [(at, mark) for mark in self.marks if (at := text.find(mark)) >= 0]
        if not found:
            return None
        at, mark = min(found)
        return text[at + len(mark) :]

    def begun(self, text: bytes) -> bytes:
        """The longest end of a text that begins a mark."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(mark.startswith(text[-length:]) for mark in self.marks):
                return text[-length:]
        return b""

    def overrunning(self, begun: bytes) -> list[int]:
        """Tokens that would complete a mark and go on with more than white space, of which a
        grammar would see nothing."""
        if begun not in self._overrunning:
            self._overrunning[begun] = [
                i for i in self._candidates if (self.rest(begun + self.tokens[i]) or b"").strip()
            ]
        return self._overrunning[begun]


@dataclass(frozen=True, slots=True)
class State:
    """Where an answer stands."""

    phase: Literal["before", "opening", "inside", "behind"]
    held: bytes = b""
    """Before a thought all text, without the white space in front; inside what may begin a closing
    mark."""
    lead: bytes | None = None
    """The text of a thought that began in the prompt, without the white space in front, for as long
    as it may open one again."""
    left: tuple[int, ...] = ()
    """Tokens that complete an opening."""
    count: int = 0
    """Tokens of thought."""
    num_forced: int = 0


BEHIND = State("behind")


class ThoughtPlace:
    """One answer on its way through its thought, in front of a grammar or of free text."""

    def __init__(
        self,
        thought: Thought,
        closings: Closings,
        *,
        eos_token_ids: Sequence[int],
        begin: Callable[[], Any] | None = None,
        allows: Callable[[Any, int], bool] | None = None,
    ) -> None:
        """``begin``: makes the place of a ``MaskTask`` for what follows the thought, None for free
        text; ``allows``: whether a token may come next at such a place. Raises RequestError where
        ``closing_ids`` close nothing."""
        self._thought, self._closings = thought, closings
        self._ends, self._begin, self._allows = eos_token_ids, begin, allows
        self._grammar = None if begin is None else begin()
        self._opening = [mark.encode() for mark in thought.opening]
        forced = b"".join(self._bytes(i) for i in thought.closing_ids)
        if closings.rest(forced) is None:
            raise RequestError(
                f"the tokens {thought.closing_ids} do not write {thought.closing[0]!r} in this "
                "model's vocabulary, so a thinking budget cannot close a thought",
                param=PARAM,
            )
        inside = thought.begins == "inside"
        self._state = State("inside", lead=b"") if inside else State("before")

    def think(self, task: MaskTask) -> list[Answer]:
        """Take the tokens of a task in, and fill the masks of its rows that belong to no grammar.
        -> what the grammar has to do for the others."""
        taken = 0
        while taken < len(task.tokens) and self._state.phase != "behind":
            after = self._next(self._state, task.tokens[taken])
            self._state = BEHIND if after is None else after
            taken += after is not None
        if self._state.phase == "behind" and self._grammar is not None:
            place, tokens = self._grammar, task.tokens[taken:]
            return [Answer(MaskTask(place, tokens, task.drafts, task.masks))]
        return self._guess(self._state, task, 0)

    def _guess(self, state: State, task: MaskTask, first: int) -> list[Answer]:
        """Fill the masks from a row on, the rest of which is guessed."""
        for row in range(first, len(task.masks)):
            drafts = task.drafts[row:]
            if self._begin is not None and state.phase == "behind":
                return [Answer(MaskTask(self._begin(), [], drafts, task.masks[row:]))]
            after = self._next(state, drafts[0]) if drafts else None
            if self._begin is not None and state.phase == "before":
                return self._fork(task, row, after)
            self._fill(state, task.masks[row])
            state = after or BEHIND
        return []

    def _fork(self, task: MaskTask, row: int, after: State | None) -> list[Answer]:
        """At the beginning of an answer that may open a thought, as the next guess does where
        there is an ``after``, or be the grammar's at once."""
        openings = [ids[0] for ids in self._thought.opening_ids]
        if after is None:
            grammar = MaskTask(self._grammar, [], task.drafts[row:], task.masks[row:])
            return [Answer(grammar, openings)]
        first = MaskTask(self._grammar, [], [], task.masks[row : row + 1])
        return [Answer(first, openings), *self._guess(after, task, row + 1)]

    def _bytes(self, token: int) -> bytes:
        tokens = self._closings.tokens
        return tokens[token] if token < len(tokens) else b""

    def _next(self, state: State, token: int) -> State | None:
        """After one more token; None for one that belongs to the grammar."""
        if state.phase == "behind":
            return state
        data = self._bytes(token)
        if state.phase == "opening":
            return replace(state, left=state.left[1:]) if state.left[1:] else State("inside")
        if state.phase == "before" and self._grammar is not None:
            return self._opened(token)
        if state.phase == "before":
            text = (state.held + data).lstrip()
            rest = self._behind_opening(text)
            if rest is None:
                return State("before", text) if self._may_open(text) else BEHIND
            state, data = State("inside", count=-1), rest
        return self._thinking(state, token, data)

    def _opened(self, token: int) -> State | None:
        for ids in self._thought.opening_ids:
            if ids[0] == token and not (self._allows and self._allows(self._grammar, token)):
                return State("opening", left=tuple(ids[1:])) if ids[1:] else State("inside")
        return None

    def _thinking(self, state: State, token: int, data: bytes) -> State:
        text = state.held + data
        if self._closings.rest(text) is not None:
            return BEHIND
        is_forced = self._forced(state) == token
        count, lead = state.count + 1, state.lead
        if lead is not None:
            lead = (lead + data).lstrip()
            if self._behind_opening(lead) is not None:
                count, lead = 0, None
            elif not self._may_open(lead):
                lead = None
        held = self._closings.begun(text)
        return State("inside", held, lead, count=count, num_forced=state.num_forced + is_forced)

    def _behind_opening(self, text: bytes) -> bytes | None:
        return next((text[len(m) :] for m in self._opening if text.startswith(m)), None)

    def _may_open(self, text: bytes) -> bool:
        return any(mark.startswith(text) for mark in self._opening)

    def _forced(self, state: State) -> int | None:
        budget = self._thought.budget
        if state.phase != "inside" or budget is None:
            return None
        if state.count < budget and not state.num_forced:
            return None
        return self._thought.closing_ids[state.num_forced]

    def _fill(self, state: State, mask: npt.NDArray[np.uint32]) -> None:
        """mask [ceil(vocab / 32)]"""
        only = state.left[0] if state.phase == "opening" else self._forced(state)
        if only is not None:
            mask.fill(0)
            allow(mask, [only])
            return
        mask.fill(ALL)
        if self._grammar is not None:  # the answer is still to come
            banned = [*self._ends, *self._closings.overrunning(state.held)]
            for token in banned:
                mask[token // 32] &= ~np.uint32(1 << token % 32)


@dataclass(frozen=True, slots=True)
class Answer:
    """The grammar's share of a task."""

    task: MaskTask
    openings: Sequence[int] = ()
    """Tokens that may come as well, in its first row."""

    def join(self) -> None:
        """Once the masks of the grammar are filled."""
        if self.task.error is None:
            allow(self.task.masks[0], self.openings)


def allow(mask: npt.NDArray[np.uint32], tokens: Sequence[int]) -> None:
    """Set the bits of tokens."""
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)


def separated(tasks: Sequence[MaskTask]) -> Iterator[tuple[MaskTask, Answer]]:
    """The grammar's share of each task, once its thought is seen to."""
    for task in tasks:
        if isinstance(task.place, ThoughtPlace):
            for answer in task.place.think(task):
                yield task, answer
        else:
            yield task, Answer(task)
