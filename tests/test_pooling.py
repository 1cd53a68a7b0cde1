"""Vectors of a decoder's prompts: those of transformers' hidden states, however they were run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models.checkpoints import make
from torch import Tensor

from vllm_di import LLM
from vllm_di.errors import ConfigError, RequestError

PROMPTS = [[5, 6, 7], [9] * 70, list(range(3, 98)) * 2, [1], list(range(3, 98)) * 2, [9] * 71]
REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda hidden: hidden[-1],
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
}
FP32 = ["platform=cpu", "model.dtype=float32", "tokenizer=bytes", "tokenizer.vocab_size=256"]
WAYS = {
    "whole": ["attention=sdpa", "ops=torch", "scheduler.max_num_batched_tokens=1024"],
    "chunks, a tape": ["scheduler.max_num_batched_tokens=32", "scheduler.max_num_seqs=4"],
    "few blocks": ["worker.num_blocks=8", "scheduler.max_num_seqs=3"],
    "static shapes": [
        "attention=sdpa",
        "graph=eager",
        "limits.mixed_steps=false",
        "limits.drafts=false",
        "limits.max_prefill_rows=2",
        "shapes=grid",
        "shapes.decode_seqs=[4]",
        "shapes.prefill_seqs=[2]",
        "shapes.prefill_queries=[64]",
        "shapes.columns=[8]",
        "scheduler.max_num_seqs=4",
        "scheduler.max_num_batched_tokens=64",
    ],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A folder, and the hidden states of each prompt behind the last norm."""
    folder = tmp_path_factory.mktemp("pooled")
    model = make("qwen3", folder)
    with torch.no_grad():
        states = [model.model(torch.tensor([p])).last_hidden_state[0] for p in PROMPTS]
    return folder, states


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pooler", REFERENCE)
def test_a_vector_is_that_of_transformers(
    pooler: str, way: str, checkpoint: tuple[Path, list[Tensor]]
) -> None:
    """Twice, so that the second time finds what it may in the prefix cache."""
    folder, states = checkpoint
    with LLM(str(folder), overrides=[*FP32, f"pooler={pooler}", *WAYS[way]]) as llm:
        for _ in range(2):
            outputs = llm.embed(PROMPTS)
            for output, prompt, hidden in zip(outputs, PROMPTS, states, strict=True):
                wanted = torch.nn.functional.normalize(REFERENCE[pooler](hidden), dim=0)
                found = torch.tensor(output.outputs.embedding)
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
                assert output.prompt_token_ids == prompt
        with pytest.raises(RequestError, match="and no text"):
            llm.generate([[1, 2]])
        assert len(llm.embed([[1, 2]])) == 1


def test_shorter_vectors_have_length_one_again(checkpoint: tuple[Path, list[Tensor]]) -> None:
    folder, states = checkpoint
    with LLM(str(folder), overrides=[*FP32, "pooler=mean", "pooler.dimensions=[16]"]) as llm:
        found = torch.tensor(llm.embed([PROMPTS[0]], dimensions=16)[0].outputs.embedding)
        wanted = torch.nn.functional.normalize(states[0].mean(0)[:16], dim=0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        with pytest.raises(RequestError, match="expected 16") as raised:
            llm.embed("a", dimensions=17)
        assert raised.value.param == "dimensions"
    with pytest.raises(ConfigError, match=r"pooler\.dimensions has 49"):
        LLM(str(folder), overrides=[*FP32, "pooler=mean", "pooler.dimensions=[49]"])


def test_a_model_that_generates_makes_no_vector() -> None:
    with (
        LLM("tiny", overrides=["platform=cpu", "model.dtype=float32", "ops=torch"]) as llm,
        pytest.raises(RequestError, match="pooler=last, mean or cls"),
    ):
        llm.embed("a")
