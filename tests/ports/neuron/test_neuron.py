"""The step exported as StableHLO, executed by XLA's CPU, against platform=cpu in fp32."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from tests.models.checkpoints import make
from tests.ports.neuron.running import PHASES, SIMULATED, running
from tests.ports.openvino.running import BLOCK, tokens
from tests.ports.openvino.running import running as plainly
from tests.ports.openvino.test_program import REFERENCE, differ

from vllm_di import LLM, SamplingParams
from vllm_di.components.shapes.grid import GridShapes
from vllm_di.components.shapes.sizes import Sizes
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.errors import ConfigError, PortError

pytest.importorskip("jax", reason="platform=neuron was not tested: pip install 'vllm-di[neuron]'")
pytest.importorskip("flatbuffers", reason="platform=neuron was not tested: as above")

TINY = ("model=tiny", "model.dtype=float32")


def logits(*overrides: str) -> list[torch.Tensor]:
    with running(*overrides) as one:
        return [one.feed(step) for step in PHASES]


def reference(*overrides: str) -> list[torch.Tensor]:
    with plainly(*REFERENCE, *overrides) as one:
        return [one.feed(step) for step in PHASES]


@pytest.fixture(scope="module")
def tiny() -> list[torch.Tensor]:
    return reference(*TINY)


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_soft_caps_and_windows(case: str, tmp_path: Path) -> None:
    make(case, tmp_path, num_hidden_layers=2)
    model = (f"model.path={tmp_path}", "model=local", "model.dtype=float32")
    assert differ(logits(*model), reference(*model)) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "bound"),
    [("attention=neuron", 1e-5), ("attention=sdpa", 1e-5), ("model.dtype=bfloat16", 4e-2)],
)
def test_both_phases(overrides: str, bound: float, tiny: list[torch.Tensor]) -> None:
    assert differ(logits(*TINY, overrides), tiny) < bound


def written_blocks(slot: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """-> two [blocks, block_size]: where a padded decode changed the cache, and where its tokens
    belong, both without block 0. ``slot``: where padding goes, in place of the policy's own."""
    with running(*TINY) as one:
        assert isinstance(one.shapes, GridShapes)
        if slot is not None:
            one.shapes._slot = slot
        one.feed([(0, tokens(0, 37))])
        given, before = one.tpu.arrays, [c.tensors for c in one.program.caches]
        plan = one.shapes.pad(one.plan([(0, tokens(1, 1)), (3, tokens(2, 1))]))
        one.program.run(plan)
        assert all(array.is_deleted() for array in given)
        slots = plan.slot_mapping[:2]
        wanted = torch.zeros(before[0][0].shape[:2], dtype=torch.bool)
        wanted[slots // BLOCK, slots % BLOCK] = True
        found = torch.zeros_like(wanted)
        for old, cache in zip(before, one.program.caches, strict=True):
            for was, now in zip(old, cache.tensors, strict=True):
                found |= (was.nan_to_num(7.0) != now.nan_to_num(7.0)).flatten(2).any(-1)
        whole = sum(array.nbytes for array in one.tpu.arrays)
        stats = one.tpu.compiled[2].memory_analysis()  # after the prompt's step and its logits
        assert stats.alias_size_in_bytes == whole, "the cache is written where it lies"
        return found[1:], wanted[1:]


def test_the_cache_is_donated_and_padding_writes_the_null_block_alone() -> None:
    found, wanted = written_blocks()
    assert torch.equal(found, wanted)
    # the mutant: padding outside the null block
    found, wanted = written_blocks(slot=5 * BLOCK + 3)
    assert not torch.equal(found, wanted)


def test_what_was_traced_is_forgotten_at_the_close() -> None:
    from jax.extend.core import Jaxpr

    def kept() -> int:
        with running(*TINY) as one:
            one.feed(PHASES[0])
        gc.collect()
        return sum(type(thing) is Jaxpr for thing in gc.get_objects())

    first = kept()
    assert first >= kept()


@pytest.mark.parametrize("attention", ["neuron", "sdpa"])
def test_one_layers_context_is_gathered_at_a_time(attention: str) -> None:
    """XLA orders the steps of a program: all layers' contexts at once filled the memory."""

    def temporary(layers: int) -> int:
        overrides = (*TINY, "loader=dummy", f"model.num_hidden_layers={layers}")
        with running(*overrides, f"attention={attention}") as one:
            one.feed([(0, tokens(1, 1)), (3, tokens(2, 1))])
            stats = one.tpu.compiled[0].memory_analysis()
            return int(stats.temp_size_in_bytes)

    assert temporary(8) < 1.5 * temporary(2)


def test_steps_are_kept_under_keys_that_hold_no_machine(
    tmp_path: Path, tiny: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for folder in ("one", "other"):
        kept = tmp_path / folder
        assert differ(logits(*TINY, f"program.cache_dir={kept}"), tiny) < 1e-5
        monkeypatch.setenv("HOSTNAME", folder)
        seen.append({path.name for path in (kept / "steps").iterdir() if path.is_dir()})
    assert seen[0] == seen[1] and len(seen[0]) >= 4, "two phases, each with its logits"
    entries = [path for path in (tmp_path / "one" / "steps").iterdir() if path.is_dir()]
    for entry in entries:
        assert "stablehlo" in (entry / "step.stablehlo.mlir").read_text()
        assert (entry / "step.hlo.pb").stat().st_size > 1000
    with monkeypatch.context() as patched:  # what was found is executed: nothing is exported
        patched.setattr("vllm_di.ports.tpu.kept.export", None)
        again = logits(*TINY, f"program.cache_dir={tmp_path / 'one'}")
    assert differ(again, tiny) < 1e-5


def served(*overrides: str) -> list[list[int]]:
    prompts = [tokens(1, 70, 300), [*tokens(1, 70, 300)[:64], 5, 6], tokens(2, 3, 300)]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    few = ["model.dtype=float32", "model.max_model_len=256", "worker.num_blocks=40"]
    limits = ["scheduler.max_num_seqs=2", "scheduler.max_num_batched_tokens=32"]
    with LLM("tiny", None, [*few, *limits, *overrides]) as llm:
        return [one.outputs[0].token_ids for one in llm.generate(prompts, greedy)]


BUCKETS = ("shapes.decode_seqs=[1,2]", "shapes.prefill_queries=[32]")


def test_tokens_are_those_of_the_cpu_and_a_bucket_one_short_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt in pieces, shared prefixes; then the mutant whose token-generation bucket is one
    short."""
    want = served("platform=cpu", "kv_layout.block_size=32")
    assert served(*SIMULATED, *BUCKETS) == want
    over = Sizes.over
    monkeypatch.setattr(Sizes, "over", lambda self, count: over(self, max(1, count - 1)))
    with pytest.raises(Exception, match="does not fit"):
        served(*SIMULATED, *BUCKETS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("attention=paged kv_layout=hnd", r"no export\(\).*attention=sdpa.*attention=neuron"),
        ("kv_layout=hnd", "NeuronAttention cannot read the KV layout 'hnd'; it reads nhd"),
        ("graph=tape", "nothing for TapeGraph to record; take graph=eager"),
        ("device=host", "program=neuron needs device=neuron, not HostDevice"),
        ("model.dtype=float16", "float16"),
        ("shapes.decode_seqs=[1,8]", "decode_seqs: a step may have 16.* this list ends at 8"),
        (
            "shapes.prefill_queries=[32]",
            "prefill_queries: a step may have 256.*add 256 to it, or lower",
        ),
        ("shapes.columns=[4]", r"columns: a step may have 8.*lower model\.max_model_len"),
        ("limits.mixed_steps=true", r"limits\.mixed_steps=false"),
    ],
)
def test_what_cannot_be_honoured_is_refused(overrides: str, message: str) -> None:
    more = [text for text in overrides.split() if text != "device=host"]
    here = ["device=host"] if "device=host" in overrides else [SIMULATED[1]]
    few = ["model.max_model_len=256"]
    with pytest.raises(ConfigError, match=message):
        served_once([SIMULATED[0], *here, *TINY, *few, *more])


def served_once(overrides: list[str]) -> None:
    with LLM("tiny", None, overrides):
        pass


@pytest.mark.parametrize(
    ("package", "more", "message"),
    [
        ("jax", (SIMULATED[1],), r"package jax .*pip install 'vllm-di\[neuron\]'"),
        ("libneuronxla", (), r"package libneuronxla; .*pip install .*device\.simulated=true"),
    ],
)
def test_a_missing_package_is_named(
    package: str, more: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "jax":
        monkeypatch.setitem(sys.modules, "jax", None)
    assert explain(assemble([SIMULATED[0], *more, *TINY])).platform == "neuron"
    with pytest.raises(PortError, match=message):
        served_once([SIMULATED[0], *more, *TINY])


def test_auto_never_chooses_it_without_neuron_cores() -> None:
    assert assemble(["model=tiny"]).settings["platform"]["name"] != "neuron"
