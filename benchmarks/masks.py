"""What structured output costs: 32 masks of 49,152 tokens in each decode step, and the first token
behind a schema that is new. ``executor=inline``, default model; constrained and free steps take
turns."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from benchmarks.figures import report
from vllm_di import LLM, SamplingParams
from vllm_di.commands.bench import prompts

BATCH, STEPS, TURNS = 32, 24, 4
LONGEST = STEPS + 80
"""Tokens of an answer: those whose prompts run first go on while others begin."""
SCHEMA_BYTES = 2048


def main() -> None:
    rows: dict[str, list[float]] = {}
    with LLM(overrides=["platform=cpu"]) as llm:
        seconds_of_step(llm, asked(0), 0)  # prepares the vocabulary, and what else is made once
        seconds_of_step(llm, None, 0)
        pairs = [
            (seconds_of_step(llm, None, turn), seconds_of_step(llm, asked(turn), turn))
            for turn in range(1, TURNS + 1)
        ]
        rows[f"batch {BATCH}: a step without masks, ms"] = [1e3 * free for free, _ in pairs]
        rows[f"batch {BATCH}: a step with {BATCH} masks, ms"] = [1e3 * held for _, held in pairs]
        rows["what the masks add, %"] = [100 * (held / free - 1) for free, held in pairs]
        turns = [
            (first_token(llm, None, number), first_token(llm, asked(100 + number), number))
            for number in range(12)
        ][2:]
        name = f"first token behind a new schema of {SCHEMA_BYTES} bytes, ms"
        rows["first token without a schema, ms"] = [1e3 * free for free, _ in turns]
        rows[name] = [1e3 * held for _, held in turns]
        rows["what the schema adds, ms"] = [1e3 * (held - free) for free, held in turns]
    report("structured output", rows)


def asked(number: int) -> dict[str, Any]:
    """A schema that no other number has, with answers of more than ``STEPS`` tokens."""
    properties: dict[str, Any] = {
        "pets": {
            "type": "array",
            "minItems": 80,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 3, "maxLength": 12},
                    "kind": {"enum": ["cat", "dog", "parrot", f"kind {number}"]},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                },
                "required": ["name", "kind", "age"],
                "additionalProperties": False,
            },
        }
    }
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    schema["required"] = ["pets"]
    field = 0
    while len(json.dumps(schema)) < SCHEMA_BYTES:
        properties[f"field_{number}_{field}"] = {"type": "string", "maxLength": 40 + field}
        field += 1
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def seconds_of_step(llm: LLM, structured: dict[str, Any] | None, seed: int) -> float:
    """The median decode step of a full batch."""
    params = SamplingParams(
        temperature=0, max_tokens=LONGEST, min_tokens=LONGEST, structured_output=structured
    )
    generations = [llm._start(p, params, False) for p in prompts(BATCH, 64, 40_000, seed)]
    owner = {r.request_id: g for g in generations for r in g.requests}
    for generation in generations:
        llm._add(generation)
    times: list[float] = []
    while len(times) < STEPS:
        begin = time.perf_counter()
        outputs = llm.engine.step().outputs
        seconds = time.perf_counter() - begin
        for output in outputs:
            owner[output.request_id].feed(output)
        if len(outputs) == BATCH:
            times.append(seconds)
        assert not times or len(outputs) == BATCH, f"{len(outputs)} of {BATCH} answers go on"
    llm._abort(generations)
    llm.engine.step()
    return statistics.median(times[1:])  # the first ends a prefill


def first_token(llm: LLM, structured: dict[str, Any] | None, seed: int) -> float:
    """Seconds from a request to its first token, alone."""
    params = SamplingParams(temperature=0, max_tokens=1, structured_output=structured)
    (prompt,) = prompts(1, 64, 40_000, 1000 + seed)
    generation = llm._start(prompt, params, False)
    begin = time.perf_counter()
    llm._add(generation)
    while not llm.engine.step().outputs:
        pass
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
