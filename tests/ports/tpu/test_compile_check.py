"""The check that compiles a step for TPUs, with the host in a chip's place. Compiled for the real
ones it takes libtpu, in ``make test-tpu-compile``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import asdict, replace

from vllm_di.cli import main
from vllm_di.containers.assembly import assemble
from vllm_di.errors import ConfigError, PortError

jax = pytest.importorskip("jax")

from vllm_di.ports.tpu import compile_check, ragged  # noqa: E402
from vllm_di.ports.tpu.compile_check import (  # noqa: E402
    MODELS,
    TARGETS,
    DescribedDevice,
    TpuCompile,
)

TINY = replace(
    MODELS["smollm2"],
    vocab_size=70,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)


def nothing(_name: str) -> None:
    """As ``find_spec`` where a package is not installed."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's CPU is every target's chip, and attention in jnp is the vendor's kernel."""

    @contextmanager
    def described(_jax: Any, _target: Any) -> Iterator[DescribedDevice]:
        yield DescribedDevice(jax, jax.devices("cpu")[:1])

    monkeypatch.setattr(compile_check, "_described", described)
    monkeypatch.setattr(compile_check, "CACHE", 1 << 20)
    monkeypatch.setitem(compile_check.MODELS, "smollm2", TINY)
    monkeypatch.setattr(compile_check, "util", SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(compile_check, "KERNEL_CALL", "ENTRY")  # once in each program
    kernel = SimpleNamespace(get_tpu_version=lambda: -1)
    monkeypatch.setattr(ragged, "load_kernel", lambda: kernel)
    monkeypatch.setattr(ragged, "by_kernel", ragged.in_jnp)


def check(*overrides: str) -> TpuCompile:
    return TpuCompile(assemble(["platform=tpu", "model=tiny", *overrides]).stages[0])


def test_a_step_is_compiled_with_its_cache_in_place(host: None) -> None:
    sizes = ("scheduler.max_num_seqs=4", "shapes.sizes=[8,16,32]")
    made = check(*sizes, "scheduler.max_num_batched_tokens=30").compile("smollm2 prefill", "v5e")
    step, head = made
    assert step.name == "step of 32 tokens"
    assert head.name == "logits of 4 rows"
    caches = 2 * compile_check.CACHE  # two layers
    assert step.figures["aliased_bytes"] == caches
    assert step.figures["argument_bytes"] > caches
    assert step.figures["copied_caches"] == step.figures["copied_bytes"] == 0
    assert step.bars["peak_bytes"] == 16 << 30
    # XLA's CPU widens a cache in bfloat16 for the step, and the bar on what is temporary sees that
    (line,) = step.beyond()
    assert "temp_bytes, and the bar is 1,048,576" in line
    assert head.beyond() == []
    (decode, _) = check(*sizes, "scheduler.max_num_batched_tokens=30").compile(
        "smollm2 decode", "v7x"
    )
    assert decode.name.startswith("step of 8 tokens")
    assert decode.bars["peak_bytes"] == 96 << 30


def test_a_cache_that_is_not_donated_is_beyond_a_bar(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, donate_argnums=None, **rest: whole(f, **rest))
    (step, _) = check().compile("smollm2 decode", "v6e")
    assert step.figures["copied_caches"] == 2
    lines = " ".join(step.beyond())
    assert "2 copied_caches, and the bar is 0" in lines
    assert "copied_bytes" in lines


def test_a_kernel_that_is_not_called_is_told(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "KERNEL_CALL", "tpu_custom_call")
    with pytest.raises(RuntimeError, match="calls no kernel of the vendor"):
        check().compile("smollm2 decode", "v6e")


def test_the_kernel_is_told_the_target_s_version(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX's first device, which it asks, is the host."""
    seen = []

    def kernel(*given: Any) -> Any:
        seen.append(ragged.load_kernel().get_tpu_version())
        return ragged.in_jnp(*given)

    monkeypatch.setattr(ragged, "by_kernel", kernel)
    check().compile("smollm2 decode", "v6e")
    check().compile("smollm2 decode", "v7x")
    assert seen == [6, 6, 7, 7]
    assert ragged.load_kernel().get_tpu_version() == -1


def test_without_the_kernel_s_package_nothing_is_compiled(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(compile_check, "util", SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(ragged, "util", SimpleNamespace(find_spec=nothing))
    ragged.load_kernel.cache_clear()
    with pytest.raises(PortError, match="tpu-inference"):
        check().compile("smollm2 decode", "v6e")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("attention=sdpa kv_layout=hnd", "compiles TpuAttention, and attention is .*SdpaAttention"),
        ("program=eager", "compiles TpuProgram, and program is"),
        ("ops=torch", "compiles TracedOps, and ops.library is"),
        ("ops.rms_norm=torch", r"leave ops\.rms_norm out"),
        ("graph=tape", "compiles EagerGraph, and graph is"),
        ("shapes=dynamic", "compiles TokenBuckets, and shapes is"),
        (
            "shapes.sizes=[16] scheduler.max_num_batched_tokens=30",
            r"shapes\.sizes: a step may have 30 tokens, but this list ends at 16; add 30 to it, or",
        ),
    ],
)
def test_another_choice_is_refused(host: None, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(*overrides.split())


def test_a_machine_without_libtpu_runs_nothing_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_check, "util", SimpleNamespace(find_spec=nothing))
    with pytest.raises(PortError, match="libtpu compiles for TPUs and is not installed"):
        check()
    with pytest.raises(SystemExit) as ended:
        main(["conform", "platform=tpu", "--only", "compile"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "not-run" in out and "pip install 'jax[tpu]==0.10.2'" in out


@pytest.mark.parametrize(("name", "option"), [("smollm2", "smollm2"), ("llama3 8B", "llama3")])
def test_the_models_are_those_of_the_options(name: str, option: str) -> None:
    node = assemble(["platform=tpu", f"model={option}", "loader=dummy"]).stages[0]["model"]
    said = {key: value for key, value in asdict(MODELS[name]).items() if value is not None}
    assert said.pop("num_hidden_layers") == compile_check.LAYERS
    assert {key: node[key] for key in said} == pytest.approx(said)  # a GGUF has 32-bit floats


def test_the_manifest_names_every_target() -> None:
    wanted = assemble(["platform=tpu", "model=tiny"]).platform.compile
    assert wanted is not None
    assert list(wanted.targets) == list(TARGETS) == list(TpuCompile.targets())
    assert len(TpuCompile.parts()) == 2 * len(MODELS)


def test_the_kernel_is_loaded_without_the_package_s_own_imports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That one imports vLLM."""
    folder = tmp_path.joinpath(*ragged.KERNEL.split(".")[:-1])
    folder.mkdir(parents=True)
    (tmp_path / ragged.PACKAGE / "__init__.py").write_text("raise ImportError('no vLLM')")
    (folder / "kernel.py").write_text("from .util import said")
    (folder / "util.py").write_text("said = 'here'")
    before = {name for name in sys.modules if name.startswith(ragged.PACKAGE)}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    ragged.load_kernel.cache_clear()
    try:
        assert ragged.load_kernel().said == "here"
        assert ragged.PACKAGE not in sys.modules
        with pytest.raises(ImportError, match="no vLLM"):
            __import__(ragged.PACKAGE)
    finally:
        ragged.load_kernel.cache_clear()
        for name in [name for name in sys.modules if name.startswith(ragged.PACKAGE)]:
            del sys.modules[name]
