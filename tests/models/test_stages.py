"""A model cut into stages gives what the whole model gives, and each stage takes its own tensors
alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.components.program.test_eager import plan
from tests.models.checkpoints import make
from tests.models.runner import Running, load

from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.graph.tape import TapeGraph
from vllm_di.components.interfaces import BatchPlan, GraphPolicy, Model
from vllm_di.components.kv_groups import group_layers
from vllm_di.components.program.eager import EagerProgram
from vllm_di.errors import CheckpointError, ConfigError
from vllm_di.models.config import DecoderConfig

TOKENS = [(7 * i * i + 3 * i) % 97 + 1 for i in range(40)]
CUTS: list[list[tuple[int, int | None]]] = [
    [(0, 1), (1, None)],
    [(0, 3), (3, 4)],
    [(0, 1), (1, 3), (3, None)],
]
CASES = ["llama2", "llama_gqa_tied", "smollm3", "gemma2", "gemma3", "granite", "qwen3_moe_mixed"]


def through(stages: list[Running], token_ids: list[int]) -> torch.Tensor:
    hidden = None
    for stage in stages:
        hidden = stage.feed(token_ids, hidden)
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("case", CASES)
def test_stages_give_the_logits_of_the_whole_model(case: str, tmp_path: Path) -> None:
    make(case, tmp_path)
    for ops, attention in (("torch", "sdpa"), ("cpu", "paged")):
        kinds: dict[str, Any] = {"ops_name": ops, "attention_name": attention}
        whole = load(tmp_path, **kinds)
        want = [whole.feed(TOKENS[:33]), whole.feed(TOKENS[33:])]
        for cut in CUTS:
            stages = [load(tmp_path, layers=span, **kinds) for span in cut]
            assert [s.model.first for s in stages] == [True] + [False] * (len(cut) - 1)
            assert [s.model.last for s in stages] == [False] * (len(cut) - 1) + [True]
            layers = [spec.layer for stage in stages for spec in stage.model.kv_specs()]
            assert layers == [0, 1, 2, 3]
            for part, logits in zip((TOKENS[:33], TOKENS[33:]), want, strict=True):
                got = through(stages, part)
                assert float((got - logits).abs().max()) <= 2e-5 * float(logits.abs().max())


@pytest.mark.parametrize(
    ("layers", "holds_embedding", "holds_head"),
    [((0, 2), True, False), ((1, 3), False, False), ((2, None), False, True)],
)
@pytest.mark.parametrize("case", ["llama2", "llama_gqa_tied"])
def test_a_stage_holds_its_own_weights_alone(
    case: str,
    layers: tuple[int, int | None],
    holds_embedding: bool,
    holds_head: bool,
    tmp_path: Path,
) -> None:
    make(case, tmp_path)
    model = load(tmp_path, layers=layers).model
    targets = set(model.targets())  # type: ignore[attr-defined]
    numbers = {int(n.split(".")[2]) for n in targets if n.startswith("model.layers.")}
    first, end = layers
    assert numbers == set(range(first, end or 4))
    tied_head = holds_head and case == "llama_gqa_tied"
    assert ("model.embed_tokens.weight" in targets) == (holds_embedding or tied_head)
    assert ("model.norm.weight" in targets) == holds_head
    assert ("lm_head.weight" in targets) == (holds_head and not tied_head)
    whole = load(tmp_path).model.weight_bytes()
    assert model.weight_bytes() < 0.9 * whole


@pytest.mark.parametrize("layers", [(0, 2), (2, 4)])
def test_tensors_that_no_stage_knows_are_still_refused(
    layers: tuple[int, int], tmp_path: Path
) -> None:
    make("llama2", tmp_path)
    model = load(tmp_path, layers=layers).model
    stranger = f"model.layers.{layers[0]}.self_attn.sinks"
    for name in (stranger, "model.embed_token.weight"):
        with pytest.raises(CheckpointError, match=f"tensor {name} is in the checkpoint but not"):
            model.load_weights(iter([(name, torch.zeros(1))]))
    with pytest.raises(CheckpointError, match="the checkpoint lacks"):
        model.load_weights(iter([]))


@pytest.mark.parametrize("layers", [(2, 2), (3, 1), (0, 5), (4, None)])
def test_layers_that_the_model_does_not_have(
    layers: tuple[int, int | None], tmp_path: Path
) -> None:
    make("llama2", tmp_path)
    with pytest.raises(ConfigError, match=r"model\.layers \[.*the model has the layers \[0, 4\]"):
        load(tmp_path, layers=layers)


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], [-1, 2], ["a", 2]])
def test_layers_are_two_numbers(layers: list[object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"layers": layers}, DecoderConfig)


def program(running: Running, graph: GraphPolicy) -> EagerProgram:
    found = EagerProgram(running.model, running.backend, running.layout, graph)
    found.allocate(group_layers([running.model.kv_specs()]), 4)
    return found


class Program:
    """A stage on a tape, as the worker runs it."""

    def __init__(self, running: Running) -> None:
        quantization = running.model._quantization  # type: ignore[attr-defined]
        communicator = running.model.embedding or running.model.head  # type: ignore[attr-defined]
        self.graph = TapeGraph(
            running.model.ops,  # type: ignore[attr-defined]
            running.backend,
            quantization,
            communicator._communicator,
            running.model,
            max_tokens=8,
            max_tapes=4,
        )
        self.run = program(running, self.graph).run


def test_a_stage_runs_from_a_tape_that_follows_its_hidden_states(tmp_path: Path) -> None:
    make("llama_gqa_tied", tmp_path)
    kinds: dict[str, Any] = {"ops_name": "cpu", "attention_name": "paged"}
    stages = [load(tmp_path, layers=span, **kinds) for span in ((0, 2), (2, 4))]
    first, second = (Program(stage) for stage in stages)
    assert first.graph.reason == second.graph.reason == ""
    batch = plan(1, [0])
    batch.slot_mapping.fill_(0)
    eager = [load(tmp_path, layers=span, **kinds) for span in ((0, 2), (2, 4))]
    programs = [program(e, EagerGraph()) for e in eager]
    for token in (5, 9, 5):
        batch.token_ids.fill_(token)
        one = first.run(batch).clone()
        assert one.shape == (1, stages[0].model.hidden_size)
        want_one = programs[0].run(batch).clone()
        assert torch.equal(one, want_one)
        # hidden states at a new address each time: an old tape would read the old ones
        got = second.run(_with(batch, one)).clone()
        want = programs[1].run(_with(batch, want_one))
        assert torch.equal(got, want)
    assert len(first.graph._tapes) == 1
    assert all(tape is not None for tape in first.graph._tapes.values())
    assert all(tape is not None for tape in second.graph._tapes.values())


def _with(batch: BatchPlan, hidden: torch.Tensor) -> BatchPlan:
    return dataclasses.replace(batch, hidden=hidden)


def test_a_fallback_model_has_no_stages(tmp_path: Path) -> None:
    from tests.models.runner import device

    from vllm_di.components.communicator.single import SingleCommunicator
    from vllm_di.components.interfaces import Placement
    from vllm_di.models.transformers_fallback import TransformersModel

    make("llama2", tmp_path)
    config = DecoderConfig(architecture="LlamaForCausalLM", path=str(tmp_path), layers=(0, 2))
    single = SingleCommunicator(Placement())
    with pytest.raises(ConfigError, match=r"model\.layers \[0, 2\].*cannot be cut into the stages"):
        TransformersModel(device(), None, single, config=config)  # type: ignore[arg-type]


def test_models_are_whole_unless_they_say_otherwise() -> None:
    assert Model.first and Model.last
