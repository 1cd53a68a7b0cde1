"""The events of a simulation, in the order of virtual time.

A replica's loop is that of its engine process: it takes what has come, makes a step, hands out what
is new, and begins again. A step is run as soon as its turn comes, on the replica's own clock, and
what it gave is handed out once the time of all has come that far: between the two nobody touches
that engine.
"""

from __future__ import annotations

import gc
import heapq
import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vllm_di.components.interfaces import ReplicaLoad
from vllm_di.components.messages import EngineRequest, EngineStats, SamplingParams, TokenOutput
from vllm_di.errors import RequestError, VllmDiError
from vllm_di.simulation.fleet import Fleet, Replica
from vllm_di.simulation.workload import Asked, Workload, requests

TOLD_EVERY = 10_000
"""Requests between two lines about how far it is."""


@dataclass(slots=True)
class Outcome:
    """What was seen, in virtual seconds."""

    seconds: float = 0.0
    """To the last end."""
    finished: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Why requests were refused or failed, and how many were."""
    cut: int = 0
    """Requests that were drawn longer than the model's context."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first: array[float] = field(default_factory=lambda: array("d"))
    """Of each request, from its arrival to its first token."""
    between: array[float] = field(default_factory=lambda: array("d"))
    """Between two tokens of a request."""
    whole: array[float] = field(default_factory=lambda: array("d"))
    """Of each request, from its arrival to its last token."""
    queue: array[float] = field(default_factory=lambda: array("d"))
    """Of each request, in its engine before its first step."""
    stats: list[EngineStats] = field(default_factory=list)
    """Of each replica, at the end."""
    busy: list[float] = field(default_factory=list)
    """Of each replica, the seconds that its workers ran steps."""


@dataclass(slots=True)
class _Live:
    """A request on its way."""

    place: _Place
    arrival: float
    held: int
    """Tokens that its replica has of it."""
    last: float = -1.0
    """When its last token came; below 0 before the first."""


@dataclass(slots=True, eq=False)
class _Place:
    """A replica as the simulation sees it."""

    replica: Replica
    inbox: list[EngineRequest] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)
    """Of its last step, to be handed out when that ends."""
    is_idle: bool = True
    num_requests: int = 0
    num_tokens: int = 0
    num_steps: int = 0


class Simulation:
    """One run of a workload on a fleet."""

    def __init__(
        self, fleet: Fleet, load: Workload, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        self._router, self._load, self._progress = fleet.router, load, progress
        self._places = [_Place(replica) for replica in fleet.replicas]
        self._loads = [ReplicaLoad(place.replica.number, 0, 0) for place in self._places]
        self._changed: set[int] = set()
        """Replicas whose entry of ``_loads`` is out of date."""
        self._requests: Iterator[Asked] = requests(
            load, fleet.report.vocab_size, fleet.report.max_model_len
        )
        self._params: dict[int, SamplingParams] = {}
        self._live: dict[str, _Live] = {}
        self._turns: list[tuple[float, int, _Place]] = []
        """When each replica that has work goes on; a heap."""
        self._numbers = itertools.count()
        self._found = Outcome()

    def run(self) -> Outcome:
        """To the end of all requests. Raises VllmDiError where an engine makes no step."""
        gc.collect()
        gc.freeze()  # thousands of components, which every collection would walk through
        try:
            return self._run()
        finally:
            gc.unfreeze()

    def _run(self) -> Outcome:
        found, turns = self._found, self._turns
        coming = None
        if self._load.rate is None:
            for _ in range(self._load.concurrency):
                self._next_arrives(0.0)
        else:
            coming = self._next(0.0)
        while turns or coming is not None:
            if coming is not None and (not turns or coming[0] <= turns[0][0]):
                self._arrive(*coming)
                coming = self._next(coming[0])
            else:
                now, _, place = heapq.heappop(turns)
                self._turn(place, now)
        found.stats = [place.replica.engine.step().stats for place in self._places]
        found.busy = [place.replica.executor.busy for place in self._places]
        return found

    def _next(self, before: float) -> tuple[float, Asked] | None:
        """The next arrival, with its time."""
        asked = next(self._requests, None)
        return None if asked is None else (before + asked.gap, asked)

    def _next_arrives(self, now: float) -> None:
        """The next request of those that come as others end."""
        asked = next(self._requests, None)
        if asked is not None:
            self._arrive(now, asked)

    def _arrive(self, now: float, asked: Asked) -> None:
        if asked.number % TOLD_EVERY == 0 and asked.number:
            self._progress(f"{asked.number} of {self._load.requests} requests, {now:.1f} s")
        params = self._params.get(asked.output)
        if params is None:
            params = SamplingParams(temperature=0, max_tokens=asked.output, ignore_eos=True)
            self._params[asked.output] = params
        request = EngineRequest(
            request_id=str(asked.number),
            prompt_token_ids=asked.prompt,
            params=params,
            arrival_time=now,
        )
        place = self._places[self._choose(request)]
        place.num_requests += 1
        place.num_tokens += len(asked.prompt)
        self._changed.add(place.replica.number)
        self._live[request.request_id] = _Live(place, now, len(asked.prompt))
        self._found.cut += asked.is_cut
        self._found.prompt_tokens += len(asked.prompt)
        place.inbox.append(request)
        if place.is_idle:
            place.is_idle = False
            self._go_on(place, now)

    def _choose(self, request: EngineRequest) -> int:
        if len(self._places) == 1:
            return 0
        for number in self._changed:
            place = self._places[number]
            self._loads[number] = ReplicaLoad(number, place.num_requests, place.num_tokens)
        self._changed.clear()
        return self._router.choose(request, self._loads)

    def _go_on(self, place: _Place, at: float) -> None:
        heapq.heappush(self._turns, (at, next(self._numbers), place))

    def _turn(self, place: _Place, now: float) -> None:
        """Hand out the last step's outputs, take what has come, make a step."""
        clock, engine = place.replica.clock, place.replica.engine
        clock.now = now
        # what a client sends because of an output comes a moment after it: the next step is begun
        inbox, place.inbox = place.inbox, []
        outputs, place.outputs = place.outputs, []
        for output in outputs:
            self._hand_out(output, now)
        for request in inbox:
            try:
                engine.add(request)
            except RequestError as error:
                self._end(self._live[request.request_id], request.request_id, now, error.message)
        if not engine.has_work():
            place.is_idle = not place.inbox
            if place.inbox:
                self._go_on(place, now)
            return
        made = engine.step()
        place.outputs = made.outputs
        if made.stats.num_steps == place.num_steps and clock.now == now and not made.outputs:
            raise VllmDiError(
                f"replica {place.replica.number} has {made.stats.num_running} requests running and "
                f"{made.stats.num_waiting} waiting, and its scheduler makes no step"
            )
        place.num_steps = made.stats.num_steps
        self._go_on(place, clock.now)

    def _hand_out(self, output: TokenOutput, now: float) -> None:
        live, found = self._live[output.request_id], self._found
        count = len(output.token_ids)
        if count:
            if live.last < 0:
                found.first.append(now - live.arrival)
                found.queue.append(output.queue_time)
            else:
                found.between.append(now - live.last)
            live.last = now
            live.held += count
            live.place.num_tokens += count
            found.generated_tokens += count
            self._changed.add(live.place.replica.number)
        if output.finish_reason is not None:
            self._end(live, output.request_id, now, output.error)

    def _end(self, live: _Live, request_id: str, now: float, error: str | None) -> None:
        found, place = self._found, live.place
        if error is None:
            found.finished += 1
            found.whole.append(now - live.arrival)
        else:
            found.refused += 1
            found.reasons[error] = found.reasons.get(error, 0) + 1
        found.seconds = max(found.seconds, now)
        place.num_requests -= 1
        place.num_tokens -= live.held
        self._changed.add(place.replica.number)
        del self._live[request_id]
        if self._load.rate is None:
            self._next_arrives(now)
