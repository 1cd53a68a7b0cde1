"""Prompts through an engine that pools, and the hidden states that their vectors must be made
of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vllm_di.components.interfaces import Engine, Pooler, SequenceState
from vllm_di.components.messages import EngineRequest, Pooling, SamplingParams
from vllm_di.conformance.driving import PATIENCE, prompt_of
from vllm_di.conformance.subject import REFERENCE, Subject

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 100)
"""Around the sizes of blocks and of padded shapes."""


def texts() -> list[list[int]]:
    """A prompt of each length."""
    return [prompt_of(length) for length in LENGTHS]


class EveryRow(Pooler):
    """Keeps the hidden states of all tokens."""

    every_token = True

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        """Of each prompt, as they ended: [tokens, hidden] fp32."""

    def report(self, size: int) -> Pooling:
        return Pooling(size=size, normalized=False, every_token=True)

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        return range(start, start + count)

    def take(self, rows: Tensor, state: SequenceState) -> None:
        state.pooler_state = [*(state.pooler_state or ()), rows.clone()]

    def finish(self, state: SequenceState) -> Tensor:
        self.rows.append(torch.cat(state.pooler_state))
        return self.rows[-1][-1]


@cache
def hidden_states(head_size: int) -> list[Tensor]:
    """Of each of ``texts``, by the reference, whole and alone: [tokens, hidden] fp32."""
    subject, kept = Subject(REFERENCE), EveryRow()
    try:
        folder = subject.model_folder(head_size=head_size)
        with subject.engine("pooler=mean", model=folder, worker={"pooler": kept}) as engine:
            for text in texts():
                run(engine, [text])
    finally:
        subject.close()
    return kept.rows


def run(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The vector of each. Raises AssertionError where one gets none, or the engine gets stuck."""
    vectors: dict[str, Tensor] = {}
    begin = time.monotonic()
    for index, prompt in enumerate(prompts):
        engine.add(
            EngineRequest(
                request_id=f"text-{index}",
                prompt_token_ids=list(prompt),
                params=SamplingParams(temperature=0, max_tokens=1),
                pools=True,
            )
        )
    while engine.has_work():
        for output in engine.step().outputs:
            assert output.error is None, output.error
            assert output.vector is not None, f"{output.request_id} ended without a vector"
            found = torch.frombuffer(bytearray(output.vector), dtype=torch.float32)
            vectors[output.request_id] = found
        assert time.monotonic() - begin < PATIENCE, "the engine still has work"
    return [vectors[f"text-{index}"] for index in range(len(prompts))]
