"""The step by the stand-in of Spyre's compiler, and by others, against platform=cpu in fp32."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.checkpoints import make
from tests.ports.openvino.running import tokens
from tests.ports.openvino.test_program import differ
from tests.ports.spyre.mutants import MUTANTS, Mutant
from tests.ports.spyre.running import BLOCK, STEPS, Padded, running
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import Placement
from vllm_di.components.messages import KvGroup
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.spyre import simulation

TINY = ("model=tiny",)
REFERENCE = ("platform=cpu", "ops=torch", "attention=sdpa", "graph=eager", "model.dtype=float32")


def reference(*overrides: str) -> list[Tensor]:
    settings = (*REFERENCE, "kv_layout.block_size=64", *overrides)
    with opened(WorkerContainer, assemble(settings), placement=Placement()) as container:
        groups = [KvGroup([spec.layer for spec in container.worker().load().kv_specs])]
        program = container.program()
        program.prepare(groups)
        program.allocate(groups, 21)
        one = Padded(container.model(), program, container.shapes())
        return [one.program.run(one.plan(step)) for step in STEPS]


def logits(*overrides: str) -> list[Tensor]:
    with running(*overrides) as one:
        return [one.feed(step) for step in STEPS]


@pytest.fixture(scope="module")
def tiny() -> list[Tensor]:
    return reference(*TINY)


@pytest.mark.parametrize("case", ["llama_biases", "qwen3", "granite", "mixtral", "smollm3"])
def test_every_kind_of_family_in_fp32(case: str, tmp_path: Path) -> None:
    make(case, tmp_path, num_hidden_layers=2)
    model = (f"model.path={tmp_path}", "model=local")
    assert differ(logits(*model), reference(*model)) < 1e-5


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "phi3_longrope"])
def test_windows_and_soft_caps_take_sdpa(case: str, tmp_path: Path) -> None:
    make(case, tmp_path, num_hidden_layers=2)
    model = (f"model.path={tmp_path}", "model=local")
    with pytest.raises(ConfigError, match=r"lacks a .*take attention=sdpa"), running(*model):
        pass
    assert differ(logits(*model, "attention=sdpa"), reference(*model)) < 1e-5


PARTS = {
    "program.backend=eager": 1e-5,
    "attention=sdpa": 1e-5,
    "attention=sdpa program.backend=eager": 1e-5,
    "program=eager": 1e-5,
    "model.dtype=float16": 1e-2,
    "quantization=int8": 5e-2,
}
"""Overrides to their bound."""


@pytest.mark.parametrize("overrides", PARTS)
def test_compilers_and_parts(overrides: str, tiny: list[Tensor]) -> None:
    assert differ(logits(*TINY, *overrides.split()), tiny) < PARTS[overrides]


@pytest.mark.slow
def test_inductor(tiny: list[Tensor]) -> None:
    assert differ(logits(*TINY, "program.backend=inductor"), tiny) < 1e-5


def test_stages_give_the_logits_of_the_whole(tiny: list[Tensor]) -> None:
    first, last = "model.layers=[0,1]", "model.layers=[1,null]"
    with running(*TINY, first) as front, running(*TINY, last) as back:
        got = [back.feed(step, front.feed(step)) for step in STEPS]
    assert differ(got, tiny) < 1e-5


def test_a_step_writes_its_slots_and_the_rest_of_its_last_block_alone() -> None:
    """And the block that is kept free: padding before the tokens lies there."""
    with running(*TINY) as one:
        before = [tensor.clone() for cache in one.program.caches for tensor in cache.tensors]
        plan = one.plan([(0, tokens(0, 70))])
        one.program.run(one.shapes.pad(plan))
        written = torch.zeros(before[0].shape[:2], dtype=torch.bool)
        written[plan.block_table[0, : -(-70 // BLOCK)].long()] = True
        now = [tensor for cache in one.program.caches for tensor in cache.tensors]
        for old, new in zip(before, now, strict=True):
            changed = (old.nan_to_num(7.0) != new.nan_to_num(7.0)).flatten(2).any(-1)
            assert torch.equal(changed[1:], written[1:])


def test_a_shape_is_compiled_once_and_counted() -> None:
    with running(*TINY) as one:
        one.feed([(0, tokens(0, 70))])
        assert one.program.num_compiles == 1
        one.feed([(1, tokens(0, 69))])
        one.feed([(2, tokens(0, 128))])
        assert one.program.num_compiles == 1
        one.feed([(0, tokens(0, 1)), (2, tokens(0, 1))])
        assert one.program.num_compiles == 2


def test_prefixes_are_shared_and_tokens_are_those_of_the_cpu() -> None:
    """Chunks of prompts, of which some begin inside a block, and rows of logits for each token."""
    prompts = [tokens(1, 150, 300), [*tokens(1, 150, 300)[:128], 5, 6], tokens(2, 3, 300)]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
    limits = ["scheduler.max_num_seqs=2", "scheduler.max_num_batched_tokens=80"]
    few = ["device.simulated=true", "shapes.columns=[4]", "shapes.prefill_queries=[192]"]
    few += ["model.max_model_len=256", "shapes.decode_seqs=[2]"]
    seen = []
    for platform, more in (("cpu", []), ("spyre", few)):
        with LLM("tiny", platform, ["model.dtype=float32", *limits, *more]) as llm:
            out = [llm.generate(prompt, greedy)[0] for prompt in prompts]
            out += llm.generate(prompts, greedy)
            seen.append([one.outputs[0].token_ids for one in out])
    assert seen[0] == seen[1]


def test_the_ops_take_padding_for_no_context() -> None:
    """Left padding of a whole block, in the vendor's terms, against attention without any."""
    simulation.define_ops()
    make = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(5, BLOCK, 2, 16, generator=make) for _ in range(2))
    q = torch.randn(1, 1, 4, 16, generator=make)
    compute = torch.ops.spyre.paged_attn_compute
    padded = (torch.tensor([BLOCK + 70]), torch.tensor([BLOCK]), torch.tensor([[0, 3, 1]]))
    plain = (torch.tensor([70]), torch.tensor([0]), torch.tensor([[3, 1]]))
    want = compute(q, keys, values, 0.25, *plain)
    assert torch.equal(compute(q, keys, values, 0.25, *padded), want)
    keys[0] = values[0] = float("nan")
    assert torch.equal(compute(q, keys, values, 0.25, *padded), want)


def test_the_compiler_refuses() -> None:
    """Free sizes, unknown ops, rows that are no whole blocks, other blocks, both phases."""
    simulation.define_ops()
    cache = torch.zeros(3, BLOCK, 1, 8)
    compute = torch.ops.spyre.paged_attn_compute.default

    def attend(seqs: int, queries: int, cache: Tensor = cache) -> Callable[[], Tensor]:
        ones = torch.ones(seqs, dtype=torch.int64)
        left, table = torch.zeros_like(ones), torch.ones(seqs, 1, dtype=torch.int64)
        q = torch.zeros(seqs, queries, 1, 8)
        return lambda: compute(q, cache, cache, 1.0, ones, left, table)

    def refused(function: Any, message: str, *args: Tensor, dynamic: bool = False) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(
            function, backend=simulation.sendnn, fullgraph=True, dynamic=dynamic
        )
        with pytest.raises(Exception, match=message), torch.no_grad():
            compiled(*args)  # type: ignore[no-untyped-call]

    refused(lambda x: x + 1, "free size", torch.zeros(3, 4), dynamic=True)
    refused(lambda x: torch.ops.aten.erfinv.default(x), "erfinv", torch.zeros(3))
    refused(attend(1, 65), "prompt of 65 rows")
    refused(attend(2, 64), "2 sequences of 64")
    refused(attend(1, 64, torch.zeros(3, 32, 1, 8)), "blocks of 32")


def test_an_op_that_falls_back_to_the_host_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class FallbackWarning(UserWarning): ...

    def falls_back(graph: Any, examples: Any) -> Any:
        warnings.warn("aten::topk runs on the CPU", FallbackWarning, stacklevel=1)
        return graph.forward

    monkeypatch.setattr(simulation, "sendnn", falls_back)
    with (
        running(*TINY) as one,
        pytest.raises(PortError, match=r"on the host, not on the card: aten::topk"),
    ):
        one.feed(STEPS[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("kv_layout.block_size=32", r"block_size 32: .*set kv_layout.block_size=64"),
        ("scheduler.max_num_seqs=64", r"decode_seqs: .* 64 sequences, .*ends at 32; add 64"),
        ("scheduler.max_num_batched_tokens=200", r"prefill_queries: .*200.*max_num_batched_tokens"),
        ("shapes.prefill_queries=[100]", r"100 is no multiple of 64; take 128"),
        ("shapes.columns=[2]", r"columns: a step may have 4 blocks .*lower model.max_model_len"),
        ("limits.mixed_steps=true", "set limits.mixed_steps=false"),
        ("limits.max_prefill_rows=2", "set limits.max_prefill_rows=1"),
        ("limits.null_block=false", "limits.null_block=true"),
        ("attention=paged kv_layout=hnd", "kv_layout"),
        ("attention=paged", "reads the layouts hnd"),
        ("kv_layout=hnd", "take kv_layout=spyre"),
        ("attention=sdpa kv_layout=hnd", "take kv_layout=spyre"),
        ("ops.rms_norm=cpu", "ops.rms_norm: CpuOps is no torch code"),
        ("program.backend=sendn", "did you mean 'sendnn'|no compiler 'sendn'"),
        ("model.dtype=bfloat16", "bfloat16"),
    ],
)
def test_what_cannot_be_honoured_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message), running(*TINY, *overrides.split()):
        pass


def test_without_the_vendor_s_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_sendnn", None)
    assert explain(assemble(["platform=spyre", *TINY])).platform == "spyre"
    with (
        pytest.raises(PortError, match=r"torch_sendnn .*install it from IBM's Spyre image"),
        running(*TINY, "device.simulated=false", "model.dtype=auto"),
    ):
        pass


def test_auto_never_chooses_it_without_a_card() -> None:
    assert assemble(["model=tiny"]).settings["platform"]["name"] != "spyre"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.override)
def test_mutants_die(mutant: Mutant, tiny: list[Tensor]) -> None:
    with (  # noqa: PT012
        pytest.raises(Exception, match=mutant.reason),
        running(*TINY, *mutant.overrides) as one,
    ):
        for step, want in zip(mutant.steps, tiny, strict=False):
            assert torch.allclose(one.feed(step), want, atol=1e-3), "logits differ"
