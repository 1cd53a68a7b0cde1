"""Who asks for what, and when: drawn from stated distributions, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_di.errors import ConfigError, nearest

LONGEST = 2**24
"""Tokens; a longer length is a slip of the pen."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens."""

    kind: str
    first: float
    """fixed: the length; uniform: the lowest; lognormal: the median."""
    second: float = 0.0
    """uniform: the highest; lognormal: the standard deviation of the logarithm."""

    FORMS = {
        "fixed": "fixed:TOKENS",
        "uniform": "uniform:LEAST,MOST",
        "lognormal": "lognormal:MEDIAN,SIGMA",
    }

    @staticmethod
    def parse(text: str, flag: str) -> Lengths:
        """``128``, ``uniform:64,512`` or ``lognormal:256,0.8``. Raises ConfigError that names
        ``flag``."""
        kind, colon, rest = text.partition(":")
        if not colon:
            kind, rest = "fixed", text
        if kind not in Lengths.FORMS:
            raise ConfigError(
                f"{flag}: {text!r}: there is no distribution {kind!r}; write TOKENS or "
                f"{', '.join(Lengths.FORMS.values())}{nearest(kind, Lengths.FORMS)}"
            )
        form = Lengths.FORMS[kind]
        try:
            numbers = [float(part) for part in rest.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != form.count(",") + 1:
            raise ConfigError(f"{flag}: {text!r}: expected {form}, in numbers")
        found = Lengths(kind, *numbers)
        if why := found._wrong():
            raise ConfigError(f"{flag}: {text!r}: {why}; expected {form}")
        return found

    def _wrong(self) -> str:
        if not 1 <= self.first <= LONGEST:
            return f"{self.first:g} is not from 1 to {LONGEST} tokens"
        if self.kind == "uniform" and not self.first <= self.second <= LONGEST:
            return f"the highest, {self.second:g}, is not from {self.first:g} to {LONGEST} tokens"
        if self.kind == "lognormal" and not 0 <= self.second <= 4:
            return f"a sigma of {self.second:g} is not from 0 to 4"
        if self.kind != "lognormal" and not (self.first.is_integer() and self.second.is_integer()):
            return "tokens are whole numbers"
        return ""

    def draw(self, draw: np.random.Generator) -> int:
        if self.kind == "fixed":
            return int(self.first)
        if self.kind == "uniform":
            return int(draw.integers(int(self.first), int(self.second) + 1))
        return max(1, min(LONGEST, round(self.first * float(np.exp(self.second * draw.normal())))))

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.first:.0f}"
        return f"{self.kind}:{self.first:g},{self.second:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The requests of one run."""

    requests: int
    rate: float | None
    """Requests a second, with gaps of a Poisson process; None: as many at a time as
    ``concurrency``."""
    concurrency: int
    input: Lengths
    """Of what a request has for itself: behind the shared prefix, where it has one."""
    output: Lengths
    prefixes: int = 0
    """Different beginnings that requests share."""
    prefix_len: int = 0
    prefix_share: float = 1.0
    """Of the requests, those that have one of them."""
    seed: int = 0

    def __str__(self) -> str:
        when = f"{self.concurrency} at a time"
        if self.rate is not None:
            when = f"{self.rate:g} a second (Poisson)"
        shared = ""
        if self.prefixes:
            shared = (
                f", {100 * self.prefix_share:g} % of them behind one of {self.prefixes} prefixes "
                f"of {self.prefix_len} tokens"
            )
        return (
            f"{self.requests} requests, {when}; prompts of {self.input} tokens{shared}; answers "
            f"of {self.output}; seed {self.seed}"
        )


@dataclass(slots=True)
class Asked:
    """One request."""

    number: int
    gap: float
    """Seconds after the one before; 0 where requests come as others end."""
    prompt: list[int]
    output: int
    """Tokens of its answer."""
    is_cut: bool
    """Whether it was shortened to fit the model's context."""


def requests(load: Workload, vocab_size: int, context: int) -> Iterator[Asked]:
    """One after the other, since all together may be more than memory holds. ``context``: tokens of
    prompt and answer at most. A request that is drawn longer is cut: its answer first, to a token
    at least, then its prompt."""
    draw = np.random.default_rng(load.seed)
    low = min(100, vocab_size // 3)  # low ids may be special

    def tokens(count: int) -> list[int]:
        found: list[int] = draw.integers(low, vocab_size, count).tolist()
        return found

    beginnings = [tokens(load.prefix_len) for _ in range(load.prefixes)]
    for number in range(load.requests):
        gap = 0.0 if load.rate is None else float(draw.exponential(1 / load.rate))
        begin: list[int] = []
        if beginnings and draw.random() < load.prefix_share:
            begin = beginnings[int(draw.integers(len(beginnings)))]
        own, wanted = load.input.draw(draw), load.output.draw(draw)
        given = min(len(begin) + own, context - 1)
        output = min(wanted, context - given)
        prompt = (begin + tokens(own))[:given]
        yield Asked(number, gap, prompt, output, (given, output) != (len(begin) + own, wanted))
