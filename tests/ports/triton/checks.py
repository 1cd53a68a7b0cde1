"""What holds of every platform of the Triton kernels on a simulated device."""

from __future__ import annotations

import pytest
import torch

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import Placement
from vllm_di.components.ops.torch import TorchOps
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError

SMALL = [
    *("model=tiny", "loader=dummy", "model.dtype=float32", "worker.num_blocks=64"),
    *("scheduler.max_num_seqs=4", "scheduler.max_num_batched_tokens=64"),
]


def tokens(*overrides: str) -> list[list[int]]:
    prompts = ["one", "a somewhat longer prompt than the first", "three"]
    with LLM(overrides=[*SMALL, *overrides]) as llm:
        found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
    return [list(answer.outputs[0].token_ids) for answer in found]


def check_tokens_are_those_of_the_reference(platform: str) -> None:
    """With steps captured as graphs, as they are by default, and eagerly."""
    simulated = [f"platform={platform}", "device.simulated=true"]
    wanted = tokens("platform=cpu", "ops=torch", "attention=sdpa", "graph=eager")
    assert tokens(*simulated) == wanted
    assert tokens(*simulated, "graph=eager", "shapes=dynamic") == wanted


def check_explain_says_what_runs(platform: str) -> None:
    assembly = assemble([f"platform={platform}", "device.simulated=true", *SMALL])
    runs = {row.op: row.runs_on for row in explain(assembly).ops}
    assert runs["paged_attention"] == "simulated: the reference stands in for the Triton kernel"
    assert runs["embedding"].startswith("torch")


def check_a_captured_step_may_not_wait_for_the_device(platform: str) -> None:
    assembly = assemble([f"platform={platform}", "device.simulated=true", *SMALL])
    with opened(
        WorkerContainer, assembly, placement=Placement(), only=("device", "ops")
    ) as container:
        device = container.device().torch_device
        module = torch.get_device_module(device)
        assert device.type == f"sim_{'xpu' if platform == 'xpu' else 'cuda'}"
        x, graph = torch.ones(2, device=device), module.CUDAGraph()
        with pytest.raises(RuntimeError, match="waits for the device"), module.graph(graph):
            x.sum().item()
        check_replays(module, x, container)


def check_replays(module: object, x: torch.Tensor, container: object) -> None:
    """A replay reads what stands at the addresses of its capture, and writes there: torch's own
    operators, and kernels that are launched."""
    ops, graph = container.ops(), module.CUDAGraph()  # type: ignore[attr-defined]
    weight = torch.ones(2, device=x.device)
    with module.graph(graph):  # type: ignore[attr-defined]
        y = ops.rms_norm((x * 2.0)[None], weight, 1e-5)
    x.copy_(torch.tensor([3.0, -4.0]))
    graph.replay()
    wanted = TorchOps().rms_norm(torch.tensor([[6.0, -8.0]]), torch.ones(2), 1e-5)
    torch.testing.assert_close(y.cpu(), wanted)


def check_stand_ins_are_for_the_simulated_device_alone(platform: str) -> None:
    choices = [
        "platform=cpu",
        "ops=triton",
        "attention=paged",
        "ops.library.simulated=true",
        *SMALL,
    ]
    with (
        opened(
            WorkerContainer, assemble(choices), placement=Placement(), only=("ops",)
        ) as container,
        pytest.raises(ConfigError, match="no simulated device") as caught,
    ):
        container.ops().rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
    assert caught.value.key == "ops.library.simulated"
