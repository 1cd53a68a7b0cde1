"""The step compiled by XLA against platform=cpu in fp32."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models.checkpoints import make
from tests.ports.openvino.running import BLOCK, STEPS, tokens
from tests.ports.openvino.running import running as plainly
from tests.ports.openvino.test_program import REFERENCE, differ
from tests.ports.tpu.running import logits, running

from vllm_di import LLM, SamplingParams
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.errors import ConfigError, PortError

pytest.importorskip("jax", reason="platform=tpu was not tested: pip install 'vllm-di[tpu]'")

TINY = ("model=tiny", "model.dtype=float32")
FAMILIES = ["llama_biases", "qwen3", "phi3_longrope", "gemma2", "gemma3", "mixtral", "smollm3"]


def reference(*overrides: str) -> list[torch.Tensor]:
    with plainly(*REFERENCE, *overrides) as one:
        return [one.feed(step) for step in STEPS]


@pytest.mark.parametrize("case", FAMILIES)
def test_every_kind_of_family_in_fp32(case: str, tmp_path: Path) -> None:
    """Biases, norms of heads, long rotary, soft caps, windows, experts, layers without rotary."""
    make(case, tmp_path, num_hidden_layers=2)
    model = (f"model.path={tmp_path}", "model=local", "model.dtype=float32")
    assert differ(logits(*model), reference(*model)) < 1e-5


@pytest.fixture(scope="module")
def tiny() -> list[torch.Tensor]:
    return reference(*TINY)


PARTS = {
    "attention=sdpa": 1e-5,
    "attention=sdpa kv_layout=hnd": 1e-5,
    "model.dtype=bfloat16": 4e-2,
    "model.dtype=bfloat16 attention=sdpa kv_layout=hnd": 4e-2,
    "kv_layout.block_size=32 ops=torch": 1e-5,
    "quantization=int8": 5e-2,
}
"""Overrides to their bound."""


@pytest.mark.parametrize("overrides", PARTS)
def test_precisions_and_parts(overrides: str, tiny: list[torch.Tensor]) -> None:
    assert differ(logits(*TINY, *overrides.split()), tiny) < PARTS[overrides]


def test_stages_give_the_logits_of_the_whole(tiny: list[torch.Tensor]) -> None:
    first, last = "model.layers=[0,1]", "model.layers=[1,null]"
    with running(*TINY, first) as front, running(*TINY, last) as back:
        got = [back.feed(step, front.feed(step)) for step in STEPS]
    assert differ(got, tiny) < 1e-5


def test_the_cache_is_written_where_it_lies_and_in_the_slots_alone() -> None:
    """XLA reuses the donated buffers: after the first step each array lies where one of the step
    before lay, and what was given is dead. Padding writes nothing, nor does a step without
    slots."""
    with running(*TINY) as one:
        one.feed([(0, tokens(0, 37))])
        given = one.tpu.arrays
        places = {array.unsafe_buffer_pointer() for array in given}
        before = [cache.tensors[0] for cache in one.program.caches]
        plan = one.shapes.pad(one.plan([(0, tokens(1, 1)), (3, tokens(2, 5))]))
        one.program.run(plan)
        assert all(array.is_deleted() for array in given)
        assert {array.unsafe_buffer_pointer() for array in one.tpu.arrays} == places
        slots = plan.slot_mapping[:6]
        written = torch.zeros(before[0].shape[:2], dtype=torch.bool)
        written[slots // BLOCK, slots % BLOCK] = True
        for old, cache in zip(before, one.program.caches, strict=True):
            changed = old.nan_to_num(7.0) != cache.tensors[0].nan_to_num(7.0)
            found = changed.flatten(2).any(-1)
            assert torch.equal(found[1:], written[1:]), "block 0 is kept free for padding"


def test_a_shape_is_compiled_once_and_counted() -> None:
    sizes = "shapes.sizes=[16,128]"
    with running(*TINY, sizes) as one:
        one.feed([(0, tokens(0, 3))])
        count = one.program.num_compiles
        assert count == 2, "the step, and its logits"
        one.feed([(0, tokens(0, 5)), (1, tokens(1, 9))])
        assert one.program.num_compiles == count
        one.feed([(0, tokens(0, 17))])
        assert one.program.num_compiles == 2 * count


def test_no_rows_and_dead_weights() -> None:
    with running(*TINY) as one:
        plan = one.shapes.pad(one.plan([(0, tokens(0, 37))]))
        plan.logits_rows = plan.logits_rows[:0]
        assert one.program.run(plan).shape == (0, 320)
        held = [t for m in one.model.modules() for t in vars(m).values()]  # type: ignore[attr-defined]
        assert max(t.numel() for t in held if isinstance(t, torch.Tensor)) <= 64, "norms alone"


def test_steps_and_compiled_programs_are_kept(
    tmp_path: Path, tiny: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (*TINY, f"program.cache_dir={tmp_path}")
    assert differ(logits(*kept), tiny) < 1e-5
    steps, xla = tmp_path / "steps", tmp_path / "xla"
    files = {path for path in xla.iterdir() if path.name.endswith("-cache")}
    assert files and len(list(steps.glob("*/step.jax"))) == len(files)
    with monkeypatch.context() as patched:  # what was found is compiled: nothing is lowered anew
        patched.setattr("vllm_di.ports.tpu.kept.export", None)
        assert differ(logits(*kept), tiny) < 1e-5
    assert {path for path in xla.iterdir() if path.name.endswith("-cache")} == files


def test_a_step_that_other_code_would_lower_is_another(
    tmp_path: Path, tiny: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (*TINY, f"program.cache_dir={tmp_path}")
    logits(*kept)
    before = {path.parent for path in tmp_path.glob("steps/*/step.jax")}
    monkeypatch.setattr("vllm_di.ports.tpu.program.sources_hash", lambda: "another")
    assert differ(logits(*kept), tiny) < 1e-5
    assert len({path.parent for path in tmp_path.glob("steps/*/step.jax")}) == 2 * len(before)


def test_the_warm_up_compiles_what_steps_run() -> None:
    """Without running it, on the host: logits of the shape and dtype that a run gives."""
    with running(*TINY) as one:
        for rows in (2, 0):
            plan = one.shapes.pad(one.plan([(0, tokens(0, 37))]))
            plan.logits_rows = plan.logits_rows[:rows]
            found = one.program.warm_up(plan)
            made = one.program.num_compiles
            ran = one.program.run(plan)
            assert (found.shape, found.dtype) == (ran.shape, ran.dtype)
            assert one.program.num_compiles == made


def test_prefixes_are_shared_and_tokens_are_those_of_the_cpu() -> None:
    """Chunks of prompts beside decodes, and rows of logits for every token of a prompt."""
    prompts = [tokens(1, 70, 300), [*tokens(1, 70, 300)[:64], 5, 6], tokens(2, 3, 300)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    limits = ["scheduler.max_num_seqs=2", "scheduler.max_num_batched_tokens=32"]
    few = ["shapes.sizes=[16,32]", "device.backend=cpu", "worker.num_blocks=200"]
    seen = []
    for platform, more in (("cpu", []), ("tpu", few)):
        with LLM("tiny", platform, ["model.dtype=float32", *limits, *more]) as llm:
            out = [llm.generate(prompt, greedy)[0] for prompt in prompts]
            out += llm.generate(prompts, greedy)
            seen.append([one.outputs[0].token_ids for one in out])
    assert seen[0] == seen[1]


def test_the_vendor_s_kernel_is_called_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tpu-inference 0.32.0 publishes it; its numbers are jnp's here."""
    import jax
    import jax.numpy as jnp

    from vllm_di.ports.tpu import ragged

    calls: list[Any] = []

    def kernel(q: Any, k: Any, v: Any, cache: Any, *index: Any, **options: Any) -> Any:
        lens, pages, starts, counts = index
        exact = jax.config.jax_default_matmul_precision
        calls.append(
            SimpleNamespace(q=q, k=k, v=v, cache=cache, index=index, options=options, exact=exact)
        )
        table = pages.reshape(len(lens), -1)
        position = lens[:, None] - 1 + jnp.zeros((1, 1), jnp.int32)
        slots = table[jnp.arange(2), position[:, 0] // 32] * 32 + position[:, 0] % 32
        options = {"window": options["sliding_window"] or 0, "cap": options["soft_cap"] or 0.0}
        return ragged.in_jnp(
            *(q, k, v, cache, lens, table, starts, slots, counts),
            *(0.25, options["window"], options["cap"]),
        )

    module = ModuleType(ragged.KERNEL)
    module.ragged_paged_attention = kernel  # type: ignore[attr-defined]
    monkeypatch.setattr(ragged, "load_kernel", lambda: module)
    rows = torch.randn(3, 2, 4, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    q, k, v = (jnp.array(x.float().numpy(), jnp.bfloat16) for x in rows)
    cache = jnp.zeros((5, 32, 4, 2, 128), jnp.bfloat16)  # 2 * 4 heads / packing of 2
    lens = jnp.array([1, 1], jnp.int32)
    table = jnp.array([[3, 0], [1, 0]], jnp.int32)
    rest = (lens, table, jnp.array([0, 1, 2], jnp.int32), jnp.array([96, 32], jnp.int32))
    given = (q, k, v, cache, *rest, jnp.array([0, 0, 2], jnp.int32), 0.25, 0, 0.0)
    out, new = ragged.by_kernel(*given)
    (call,) = calls
    assert call.q.dtype == call.k.dtype == call.v.dtype == call.cache.dtype
    assert [x.dtype for x in call.index] == [jnp.int32] * 4
    assert [x.shape for x in call.index] == [(2,), (4,), (3,), (3,)]
    assert call.options == {"sm_scale": 0.25, "sliding_window": None, "soft_cap": None}
    assert out.shape == q.shape and new.shape == cache.shape
    assert bool((out == v).all()), "one token sees itself"
    ragged.by_kernel(*given[:-2], 7, 5.0)
    assert calls[1].options == {"sm_scale": 0.25, "sliding_window": 7, "soft_cap": 5.0}
    with jax.default_matmul_precision("highest"):  # as in a program; the kernel's products in
        ragged.by_kernel(*given)  # bfloat16 have no such thing: it does not compile
        exact: list[Any] = [x.astype(jnp.float32) for x in given[:4]]
        ragged.by_kernel(*[*exact, *given[4:]])
    assert [call.exact for call in calls[2:]] == ["default", "highest"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("attention=paged kv_layout=hnd", r"no export\(\).*attention=sdpa.*attention=tpu"),
        ("kv_layout=hnd", "reads the KV layout 'tpu', not 'hnd'; take kv_layout=tpu"),
        ("ops.rms_norm=cpu", "ops.rms_norm: CpuOps is no torch code"),
        ("graph=tape", "nothing for TapeGraph to record; take graph=eager"),
        ("device=host", "device=tpu, not HostDevice"),
        ("kv_layout.block_size=17", "block_size 17: .* a multiple of 2"),
        ("model.dtype=float16", "float16"),
        ("device.chips=4096", "device.chips 4096: JAX has 1 devices of cpu.*lower it"),
        ("shapes.sizes=[16]", "may have 128 tokens, but this list ends at 16"),
    ],
)
def test_what_cannot_be_honoured_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message), running(*TINY, *overrides.split()):
        pass


def test_an_op_without_a_lowering_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_di.ports.tpu import lowering

    known = {op: f for op, f in lowering.TABLE.items() if op != torch.ops.aten.rsqrt.default}
    monkeypatch.setattr(lowering, "TABLE", known)
    with pytest.raises(ConfigError, match=r"no lowering for aten\.rsqrt\.default"), running(*TINY):
        pass


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    assert explain(assemble(["platform=tpu", *TINY])).platform == "tpu"
    with (
        pytest.raises(PortError, match=r"package jax .*pip install 'vllm-di\[tpu\]'"),
        running(*TINY),
    ):
        pass


def test_without_a_tpu_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with (
        pytest.raises(PortError, match=r"backend=tpu: .*pip install 'jax\[tpu\]"),
        running(*TINY, "device.backend=tpu"),
    ):
        pass
    with running(*TINY, "device.backend=auto"):
        pass
    assert "no TPU is here; XLA compiles for the host's CPU" in caplog.text


def test_the_kernel_s_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_di.ports.tpu import ragged

    monkeypatch.setattr(ragged, "util", SimpleNamespace(find_spec=lambda _name: None))
    ragged.load_kernel.cache_clear()
    with pytest.raises(PortError, match=r"tpu-inference .*pip install --no-deps tpu-inference"):
        ragged.load_kernel()


def test_auto_never_chooses_it_without_a_chip() -> None:
    assert assemble(["model=tiny"]).settings["platform"]["name"] != "tpu"
