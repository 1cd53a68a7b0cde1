"""The compiled step against platform=cpu in fp32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.checkpoints import make
from tests.ports.openvino.running import BLOCK, STEPS, running, tokens

from vllm_di import LLM, SamplingParams
from vllm_di.components.program.traced import TracedStep
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.errors import ConfigError, PortError
from vllm_di.ports.openvino.convert import convert
from vllm_di.ports.openvino.device import OpenVinoDevice

REFERENCE = ("platform=cpu", "ops=torch", "attention=sdpa", "graph=eager")


def logits(*overrides: str) -> list[torch.Tensor]:
    with running(*overrides) as one:
        return [one.feed(step) for step in STEPS]


def differ(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest difference, as a share of the largest logit."""
    most = max(float(w.abs().max()) for w in want)
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) / most


FAMILIES = [
    *("llama_biases", "llama3.1_rope", "mistral_window", "qwen2", "qwen3", "smollm3"),
    *("granite", "phi3_longrope", "gemma3", "mixtral", "qwen3_moe_mixed"),
]


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_in_fp32(case: str, tmp_path: Path) -> None:
    make(case, tmp_path, num_hidden_layers=2)
    model = (f"model.path={tmp_path}", "model=local", "model.dtype=float32")
    want = logits(*REFERENCE, *model)
    assert differ(logits("platform=openvino", *model), want) < 1e-5


PRECISIONS = {
    "model.dtype=float32 kv_layout.dtype=uint8": 3e-2,
    "model.dtype=bfloat16": 4e-2,
    "model.dtype=bfloat16 kv_layout.dtype=uint8": 6e-2,
    "model.dtype=float32 attention=sdpa": 1e-5,
    "model.dtype=float32 program=eager": 1e-5,
    "model.dtype=float32 program=eager kv_layout.dtype=uint8": 3e-2,
}
"""Overrides to their bound."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, str], list[torch.Tensor]]:
    """Overrides that name a small Llama, and its logits in fp32."""
    folder = tmp_path_factory.mktemp("llama")
    make("llama_gqa_tied", folder, num_hidden_layers=2, initializer_range=0.08)
    model = ("model=local", f"model.path={folder}")
    return model, logits(*REFERENCE, *model, "model.dtype=float32")


@pytest.mark.parametrize("overrides", PRECISIONS)
def test_precisions_and_parts(
    overrides: str, llama: tuple[tuple[str, str], list[torch.Tensor]]
) -> None:
    model, want = llama
    got = logits("platform=openvino", *model, *overrides.split())
    assert differ(got, want) < PRECISIONS[overrides]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights(quantization: str) -> None:
    """As the reference's, whose weights are rounded in the same way."""
    model = ("model=tiny", "model.dtype=float32", f"quantization={quantization}")
    want = logits(*REFERENCE, *model)
    assert differ(logits("platform=openvino", *model), want) < 1e-4


def test_a_soft_cap_runs_with_sdpa(tmp_path: Path) -> None:
    make("gemma2", tmp_path, num_hidden_layers=2)
    model = ("model=local", f"model.path={tmp_path}", "model.dtype=float32")
    want = logits(*REFERENCE, *model)
    assert differ(logits("platform=openvino", "attention=sdpa", *model), want) < 1e-5
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping 5: .* take attention=sdpa"):
        logits("platform=openvino", *model)


def test_stages_give_the_logits_of_the_whole(
    llama: tuple[tuple[str, str], list[torch.Tensor]],
) -> None:
    """Both stages compiled, and one of them beside one that runs on the reference."""
    model, want = llama
    first, last = "model.layers=[0,1]", "model.layers=[1,null]"
    ours = ("platform=openvino", *model, "model.dtype=float32")
    theirs = (*REFERENCE, *model, "model.dtype=float32")
    for one, two in ((ours, ours), (theirs, ours), (ours, theirs)):
        with running(*one, first) as front, running(*two, last) as back:
            got = [back.feed(step, front.feed(step)) for step in STEPS]
        assert differ(got, want) < 1e-5


def test_only_the_wanted_rows_and_only_their_slots(
    llama: tuple[tuple[str, str], list[torch.Tensor]],
) -> None:
    model, want = llama
    with running("platform=openvino", *model, "model.dtype=float32") as one:
        before = [cache.key.clone() for cache in one.caches]
        plan = one.plan([(0, tokens(0, 37))])
        for rows in ([36], [0, 5, 36], []):
            plan.logits_rows = torch.tensor(rows, dtype=torch.int64)
            got = one.program.run(plan)
            assert got.shape == (len(rows), 99) and got.dtype == torch.float32
            assert torch.allclose(got, want[0][rows], atol=1e-5 * float(want[0].abs().max()))
        written = torch.zeros(before[0].shape[0], BLOCK, dtype=torch.bool)
        written[plan.slot_mapping // BLOCK, plan.slot_mapping % BLOCK] = True
        for old, cache in zip(before, one.caches, strict=True):
            changed = cache.key.nan_to_num(7.0) != old.nan_to_num(7.0)
            assert torch.equal(changed.any(-1).any(1), written)
        # a warm-up writes to block 0 alone
        old = one.caches[0].key[1:].clone()
        plan.slot_mapping = torch.full((37,), -1)
        plan.block_table = torch.zeros_like(plan.block_table)
        one.program.run(plan)
        assert torch.equal(old.nan_to_num(7.0), one.caches[0].key[1:].nan_to_num(7.0))


@pytest.mark.parametrize(("dtype", "shares"), [("float32", True), ("bfloat16", False)])
def test_weights_of_the_compiled_model_are_alive(
    dtype: str,
    shares: bool,
    llama: tuple[tuple[str, str], list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The module's weights are dropped. Constants in fp32 hold those that they share; in bf16
    OpenVINO's hold nothing, so none may share."""
    found: list[bool] = []

    def converted(step: TracedStep) -> Any:
        model = convert(step)
        tensors = [t for _, t in step.graph.named_buffers()]
        spans = [range(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
        kinds = {"float32": "f32", "bfloat16": "bf16"}
        found.extend(
            any(op.tensor_view.data.ctypes.data in span for span in spans)
            for op in constants
            if op.get_element_type().get_type_name() == kinds[dtype] and len(op.shape) == 2
        )
        return model

    monkeypatch.setattr("vllm_di.ports.openvino.program.convert", converted)
    with running("platform=openvino", *llama[0], f"model.dtype={dtype}"):
        assert len(found) > 8 and any(found) == shares


def test_rotary_is_one_node(
    llama: tuple[tuple[str, str], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cosines stay in fp32 there, whatever the precision of the rest."""
    found: list[str] = []

    def compiled(self: OpenVinoDevice, *given: Any) -> Any:
        model = compile_model(self, *given)
        nodes = model.get_runtime_model().get_ops()
        found.extend(str(op.get_rt_info()["layerType"].value) for op in nodes)
        return model

    compile_model = OpenVinoDevice.compile
    monkeypatch.setattr(OpenVinoDevice, "compile", compiled)
    with running("platform=openvino", *llama[0], "model.dtype=bfloat16"):
        assert found.count("RoPE") == 2 * 2, "queries and keys of two layers"


def test_sizes_of_the_model_are_no_sizes_of_the_batch(tmp_path: Path) -> None:
    """Three heads, as many as the smallest batch that could be traced."""
    make("llama_gqa_tied", tmp_path, num_attention_heads=6, num_key_value_heads=3)
    model = ("model=local", f"model.path={tmp_path}", "model.dtype=float32")
    want = logits(*REFERENCE, *model)
    assert differ(logits("platform=openvino", "attention=sdpa", *model), want) < 1e-5


def test_padding_is_cut_off(llama: tuple[tuple[str, str], list[torch.Tensor]]) -> None:
    model, want = llama
    with running("platform=openvino", *model, "model.dtype=float32") as one:
        plan = one.plan([(0, tokens(0, 37))])
        zeros = torch.zeros(3, dtype=torch.int64)
        plan.token_ids = torch.cat((plan.token_ids, zeros))
        plan.positions = torch.cat((plan.positions, zeros))
        plan.slot_mapping = torch.cat((plan.slot_mapping, zeros - 1))
        assert differ([one.program.run(plan)], want[:1]) < 1e-5


def test_the_weights_are_dropped_once_compiled() -> None:
    with running("platform=openvino", "model=tiny") as one:
        assert one.model.weight_bytes() > 0
        held = [t for m in one.model.modules() for t in vars(m).values()]  # type: ignore[attr-defined]
        sizes = [t.numel() for t in held if isinstance(t, torch.Tensor)]
        assert max(sizes) <= 64  # norms alone
        assert one.feed([(0, [1, 2, 3])]).shape == (3, 320)


def test_compiled_models_can_be_kept(tmp_path: Path) -> None:
    overrides = ("platform=openvino", "model=tiny", "model.dtype=float32")
    kept = (*overrides, f"program.cache_dir={tmp_path}")
    want = logits(*overrides)
    assert differ(logits(*kept), want) == 0
    files = list(tmp_path.iterdir())
    assert files
    assert differ(logits(*kept), want) == 0
    assert list(tmp_path.iterdir()) == files


def test_prefixes_are_shared_and_tokens_are_those_of_the_cpu() -> None:
    prompts = [tokens(1, 70, 300), [*tokens(1, 70, 300)[:64], 5, 6], tokens(2, 3, 300)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    seen = []
    for platform in ("cpu", "openvino"):
        with LLM("tiny", platform, ["model.dtype=float32", "scheduler.max_num_seqs=2"]) as llm:
            out = [llm.generate(prompt, greedy)[0] for prompt in prompts]
            out += llm.generate(prompts, greedy)
            seen.append([one.outputs[0].token_ids for one in out])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "attention=paged",
            r"PagedAttention has no export\(\).*attention=sdpa.*attention=openvino",
        ),
        ("ops=cpu attention=sdpa", "CpuOps is no torch code"),
        ("ops.rms_norm=cpu", "ops.rms_norm: CpuOps is no torch code.*choose traced or torch"),
        ("graph=tape", "nothing for TapeGraph to record; take graph=eager"),
        ("device=host", "device=openvino, not HostDevice"),
        ("kv_layout=hnd kv_layout.block_size=16", "block_size: .* blocks of 32 tokens, not 16"),
        ("kv_layout.dtype=uint8 attention=sdpa", "gathers_blocks, and 'openvino_u8' does not"),
        ("model.dtype=float16", "float16"),
        ("model.dtype=float32 kv_layout.dtype=bfloat16", "takes a KV cache of f32, u8"),
        ("kv_layout.dtype=int4", "kv_layout.dtype"),
    ],
)
def test_what_cannot_be_honoured_is_refused(overrides: str, message: str) -> None:
    with (
        pytest.raises(ConfigError, match=message),
        running("platform=openvino", "model=tiny", *overrides.split()),
    ):
        pass


def test_the_sampler_s_ops_may_be_anyone_s() -> None:
    with running("platform=openvino", "model=tiny", "ops.greedy_sample=cpu", "ops.linear=torch"):
        pass


def test_explain_says_that_the_compiler_runs_the_ops() -> None:
    found = explain(assemble(["platform=openvino", "model=tiny"]))
    classes = {row.slot: row.target for row in found.rows}
    for slot in ("device", "ops", "kv_layout", "attention", "program"):
        place = "vllm_di.components.ops.table" if slot == "ops" else "vllm_di.ports.openvino."
        assert classes[slot].startswith(place)
    runs = {row.op: row.runs_on for row in found.ops}
    assert runs["rms_norm"] == runs["linear"] == "openvino compiler"
    assert "outside the compiled step" in runs["greedy_sample"]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert explain(assemble(["platform=openvino", "model=tiny"])).platform == "openvino"
    with (
        pytest.raises(PortError, match=r"package openvino .*pip install 'vllm-di\[openvino\]'"),
        running("platform=openvino", "model=tiny"),
    ):
        pass


def test_another_release_of_the_op_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino.op

    def other(_inputs: object) -> None:
        raise RuntimeError("Check 'get_input_size() == 29' failed")

    monkeypatch.setattr(openvino.op, "_PagedAttentionExtension", other)
    with (
        pytest.raises(PortError, match=r"takes other inputs than that of 2026\.4"),
        running("platform=openvino", "model=tiny"),
    ):
        pass


def test_auto_never_chooses_it() -> None:
    assert assemble(["model=tiny"]).settings["platform"]["name"] != "openvino"
