"""The key of a compiled program, and the names and shares of a traced step's weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import Communicator, Placement, PlanShape, WeightPart
from vllm_di.components.kv_groups import Groups
from vllm_di.components.messages import KvGroup
from vllm_di.components.program.compile_cache import compile_key
from vllm_di.components.program.traced import TracedStep, share, trace_step
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError

TINY = ("model=tiny", "ops=traced", "attention=sdpa", "graph=eager", "model.dtype=float32")


class Rank(SingleCommunicator):
    """One of several ranks, that meets none of them."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@contextmanager
def traced(*overrides: str, communicator: Communicator | None = None) -> Iterator[TracedStep]:
    given: dict[str, Any] = {} if communicator is None else {"communicator": communicator}
    assembly = assemble(["platform=cpu", *TINY, *overrides])
    with opened(WorkerContainer, assembly, placement=Placement(), **given) as container:
        layers = container.worker().load().kv_specs
        model, layout = container.model(), container.kv_layout()
        groups = Groups(model.kv_specs(), [KvGroup([spec.layer for spec in layers])])
        yield trace_step(
            model,
            container.attention().export(),
            groups,
            lambda blocks: layout.allocate(groups.pool, blocks, model.dtype),
            layout.block_size,
            container.communicator(),
        )


def key(*overrides: str, target: str = "chip", with_weights: bool = False, **more: object) -> str:
    with traced(*overrides) as step:
        versions = {"compiler": str(more.get("version", 1))}
        shapes = [PlanShape(1, 1, 1, int(str(more.get("columns", 4))), 1)]
        return compile_key(
            step, target=target, versions=versions, shapes=shapes, with_weights=with_weights
        )


def test_it_is_the_same_in_another_process() -> None:
    code = f"from {__name__} import key; print(key(with_weights=True))"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == key(with_weights=True)


def test_it_changes_with_what_is_compiled() -> None:
    seed = "loader.seed=1"
    keys = [
        key(),
        key("model.rms_norm_eps=1e-6"),
        key("model.num_hidden_layers=1"),
        key("model.dtype=bfloat16"),
        key("model.rope_theta=5000.0"),  # a table of constants
        key(target="another chip"),
        key(version=2),
        key(columns=5),
        key(with_weights=True),
        key(seed, with_weights=True),
    ]
    assert len(set(keys)) == len(keys)
    assert key(seed) == key(), "weights that are inputs are no part of the program"


def test_weights_keep_their_names() -> None:
    with traced() as step:
        named = {name for parts in step.weights.values() for name in (part.name for part in parts)}
        assert {"lm_head.weight", "model.layers.1.self_attn.k_proj.weight"} <= named
        parts = step.weights["model_layers_0_self_attn_q_proj_weight"]
        assert [(part.name[-13:], part.rows) for part in parts] == [
            ("q_proj.weight", 64),
            ("k_proj.weight", 32),
            ("v_proj.weight", 32),
        ]
        assert getattr(step.graph, "model_norm_weight").shape == (64,)  # noqa: B009


def test_collectives_without_marks_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match=r"Rank has no export\(\).*communicator=marked"),
        traced(communicator=Rank(0, 2)),
    ):
        pass


@pytest.mark.parametrize(
    ("part", "rank", "want"),
    [
        (WeightPart("w", 0, 6), 1, [0, 1, 2, 3, 4, 5]),
        (WeightPart("w", 2, 4, 0, 2), 3, [4, 5]),
        (WeightPart("w", 0, 6, 0, 4), 3, [0, 0]),  # padded: two rows a rank, none are left
        (WeightPart("w", 0, 6, 0, 4), 2, [4, 5]),
        (WeightPart("w", 0, 6, 0, 2), 1, [0, 1, 2]),  # ranks 0 and 1 share a head
        (WeightPart("w", 0, 2, offset=1.0), 0, [1, 2]),
        (WeightPart("w", 0, 2, first_rank_only=True), 0, [0, 1]),
        (WeightPart("w", 0, 2, first_rank_only=True), 1, [0, 0]),
    ],
)
def test_a_rank_s_share(part: WeightPart, rank: int, want: list[int]) -> None:
    tensor = torch.arange(6)[:, None].expand(6, 3)
    assert share(tensor, part, Rank(rank, 4))[:, 0].tolist() == want
    assert share(torch.arange(6)[None], WeightPart("w", 0, 1, 1, 3), Rank(2, 3)).tolist() == [
        [4, 5]
    ]
