"""A row's result is its own: whoever stands beside it, in whatever order, step after step."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.components.sampler.rows import row, same, sampler

from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import OpTable, SequenceState
from vllm_di.components.ops.cpu import CpuOps
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps

VOCAB = 77  # no multiple of a vector's length
IDS = st.integers(0, VOCAB - 1)


@pytest.fixture(scope="module", params=["torch", "cpu"])
def ops(request: pytest.FixtureRequest) -> OpTable:
    if request.param == "torch":
        return SelectedOps(TorchOps())
    device = HostDevice(threads=1, memory_budget=None, default_dtype="float32")
    try:
        library = CpuOps(device, isa="auto", compile="auto", cache=None, rows_for_onednn=None)
    finally:
        device.close()
    return SelectedOps(library)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Keywords of one row, of every kind at once."""
    maybe = st.booleans()
    asked: dict[str, Any] = {
        "prompt": draw(st.lists(IDS, min_size=1, max_size=6)),
        "output": draw(st.lists(IDS, max_size=4)),
        "temperature": draw(st.sampled_from([0.0, 0.2, 1.0, 5.0])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "max_tokens": None,
    }
    choices: dict[str, st.SearchStrategy[Any]] = {
        "top_k": st.integers(1, 90),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(IDS, st.floats(-100, 100), min_size=1, max_size=3),
        "allowed_token_ids": st.lists(IDS, min_size=1, max_size=9),
        "bad_words": st.lists(st.lists(IDS, min_size=1, max_size=3), max_size=3),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.lists(IDS, max_size=2),
        "eos": st.lists(IDS, max_size=2),
        "logprobs": st.integers(0, 20),
    }
    for name, values in choices.items():
        if draw(maybe):
            asked[name] = draw(values)
    return asked


def logits_of(places: list[int], step: int) -> torch.Tensor:
    """[rows, vocab], a row's from its own place and the step alone; some with ties, some broken."""
    made = []
    for place in places:
        generator = torch.Generator().manual_seed(1000 * step + place)
        values = torch.randn(VOCAB, generator=generator) * 4
        if place % 3 == 1:
            values = values.round()
        if (place + step) % 7 == 6:
            values[place % VOCAB] = float("nan")
        made.append(values)
    return torch.stack(made)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(asked=st.lists(requests(), min_size=1, max_size=7), data=st.data())
def test_in_company_as_alone(
    ops: OpTable, asked: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Three steps, each in another order and company; each row also runs by itself."""
    together, alone = sampler(ops), [sampler(ops) for _ in asked]
    crowd = [row(i, **one) for i, one in enumerate(asked)]
    single = [row(i, **one) for i, one in enumerate(asked)]
    for step in range(3):
        order = data.draw(st.permutations(range(len(asked))))
        order = order[: data.draw(st.integers(1, len(order)))]
        tokens, failed = together.sample(logits_of(order, step), [crowd[i] for i in order])
        by_id = {token.seq_id: token for token in tokens}
        assert set(by_id) | set(failed) == set(order)
        assert not set(by_id) & set(failed)
        for i in order:
            solo, broken = alone[i].sample(logits_of([i], step), [single[i]])
            if i in failed:
                assert broken == {i: failed[i]}
                continue
            assert same(by_id[i], solo[0])
            _append(crowd[i], single[i], token=solo[0].token_ids[0])


def _append(*states: SequenceState, token: int) -> None:
    for state in states:
        state.token_ids.append(token)
