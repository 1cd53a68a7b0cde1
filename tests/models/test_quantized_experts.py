"""Experts in 8 and 4 bits: the tokens of the dequantised model, in a fraction of its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tests.components.loader.test_gguf import read_config
from tests.components.ops.libraries import ISAS, library
from tests.models.checkpoints import make
from tests.models.gguf_files import write
from tests.models.quantized_checkpoints import SIZES, quantize
from tests.models.ranks import on_ranks
from tests.models.runner import BLOCK, Running, attention, device
from tests.models.test_quantized_checkpoints import TOKENS, load, off, wanted
from torch import Tensor

from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import Communicator, OpTable, Placement, Quantization
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.gguf import GgufLoader
from vllm_di.components.loader.safetensors import SafetensorsLoader
from vllm_di.components.ops.cpu_packing import PackedBytes
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.ops.traced import TracedOps
from vllm_di.components.quantization.kept import KeptWeights
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantization.rounded import RoundedWeights
from vllm_di.components.quantized import by_channel, by_group
from vllm_di.errors import CheckpointError, ConfigError
from vllm_di.models.checkpoint import describe
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.models.hf_config import model_fields
from vllm_di.models.moe import Experts

LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
FAMILIES = {"mixtral": LAYERS, "qwen3_moe": LAYERS | {"moe_intermediate_size": 64}}
KEPT = [
    *(("mixtral", kind) for kind in ("awq_64", "gptq_4_sym", "gptq_8_asym", "w4a16_asym", "w8a8")),
    ("qwen3_moe", "awq_32"),
    ("qwen3_moe", "gptq_4_act_order"),
]


def build(
    config: DecoderConfig,
    quantization: Callable[[OpTable], Quantization],
    table: OpTable | None = None,
    communicator: Communicator | None = None,
) -> Running:
    on = device()
    table = table or SelectedOps(TorchOps())
    layout = HndLayout(on, block_size=BLOCK, dtype="auto")
    backend = attention("sdpa", table, layout)
    ranks = communicator or SingleCommunicator(Placement())
    model = Decoder(on, table, backend, ranks, quantization(table), config=config)
    return Running(model, backend, layout)


def config_of(folder: Path, **changes: Any) -> DecoderConfig:
    fields = model_fields(describe(str(folder)).hf_config)
    return DecoderConfig(dtype="float32", **(fields | changes))


def from_files(
    folder: Path, quantization: Callable[[OpTable], Quantization], **more: Any
) -> Running:
    running = build(config_of(folder), quantization, **more)
    SafetensorsLoader(path=str(folder), progress=False).load(running.model)
    return running


def rounded(bits: Any) -> Callable[[OpTable], Quantization]:
    return lambda table: RoundedWeights(
        table, bits=bits, scales="channel" if bits == 8 else "group"
    )


def dequantised(folder: Path, bits: int) -> Running:
    """In floats that are what the quantization rounds to."""

    def grid(weight: Tensor) -> Tensor:
        made = by_channel(weight) if bits == 8 else by_group(weight, bits)
        return made.dequantize(torch.float32)

    running = build(config_of(folder), NoQuantization)
    running.model.load_weights(
        (name, grid(tensor) if tensor.dim() == 2 and "embed" not in name else tensor)
        for name, tensor in load_file(folder / "model.safetensors").items()
    )
    return running


def expert_bytes(running: Running) -> int:
    assert isinstance(running.model, Decoder)
    return sum(m.num_bytes for m in running.model.modules() if isinstance(m, Experts))


def far(found: Tensor, want: Tensor) -> float:
    """Of activations in bytes: the mean difference, of the mean logit."""
    return float((found - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", FAMILIES)
def test_rounded_experts_equal_the_dequantised_model(case: str, bits: int, tmp_path: Path) -> None:
    make(case, tmp_path, **(SIZES | FAMILIES[case]))
    want = dequantised(tmp_path, bits).feed(TOKENS)
    running = from_files(tmp_path, rounded(bits))
    assert off(running.feed(TOKENS), want) < 1e-4
    traced = from_files(tmp_path, rounded(bits), table=SelectedOps(TracedOps(compiler="none")))
    assert off(traced.feed(TOKENS), want) < 1e-4
    kernels = from_files(tmp_path, rounded(bits), table=SelectedOps(library(ISAS[0])))
    assert 0 < far(kernels.feed(TOKENS), want) < 0.2
    whole = from_files(tmp_path, NoQuantization)
    share = expert_bytes(running) / expert_bytes(whole)  # of fp32
    assert share < {8: 0.32, 4: 0.16}[bits]  # in rows as short as these the scales weigh


@pytest.mark.parametrize(("case", "kind"), KEPT)
def test_kept_experts_equal_transformers(case: str, kind: str, tmp_path: Path) -> None:
    want = wanted(quantize(case, kind, tmp_path, **FAMILIES[case]))
    assert off(load(tmp_path).feed(TOKENS), want) < 1e-3
    assert (
        off(load(tmp_path, table=SelectedOps(TracedOps(compiler="none"))).feed(TOKENS), want) < 1e-3
    )
    assert far(load(tmp_path, table=SelectedOps(library(ISAS[0]))).feed(TOKENS), want) < 0.2


def test_every_expert_is_packed_in_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize("mixtral", "gptq_4_sym", tmp_path, **LAYERS)
    ops, sizes = library(ISAS[0]), list[int]()
    for name in ("pack_quantized", "pack_gated_quantized"):
        pack = getattr(ops, name)

        def spy(weight: Any, pack: Any = pack) -> Any:
            packed = pack(weight)
            assert isinstance(packed, PackedBytes)
            assert packed.bits == 4
            sizes.append(packed.data.nbytes)
            return packed

        monkeypatch.setattr(ops, name, spy)
    running = load(tmp_path, table=SelectedOps(ops))
    assert len(sizes) == 2 * (2 + 4 * 2)  # qkv and o, and two products of four experts
    # embedding, head, routers and norms, in fp32
    floats = 4 * (2 * 300 * 64 + 2 * (4 * 64 + 2 * 64) + 64)
    assert running.model.weight_bytes() - sum(sizes) == floats


def test_a_token_does_not_depend_on_the_others(tmp_path: Path) -> None:
    make("mixtral", tmp_path, **(SIZES | LAYERS))
    table = SelectedOps(library(ISAS[0]))
    whole = from_files(tmp_path, rounded(8), table=table).feed(TOKENS)
    again = from_files(tmp_path, rounded(8), table=table)
    parts = [again.feed(TOKENS[i : i + 7]) for i in range(0, len(TOKENS), 7)]
    assert off(torch.cat(parts), whole) < 1e-5


@pytest.mark.parametrize(
    ("case", "kind"), [("mixtral", "awq_64"), ("mixtral", "w8a8"), ("qwen3_moe", "gptq_8_sym_row")]
)
def test_two_ranks_equal_one(case: str, kind: str, tmp_path: Path) -> None:
    quantize(case, kind, tmp_path, **FAMILIES[case])
    want = load(tmp_path).feed(TOKENS)
    for found in on_ranks(2, lambda rank: load(tmp_path, communicator=rank).feed(TOKENS)):
        assert off(found, want) < 1e-4


def test_two_ranks_of_rounded_experts(tmp_path: Path) -> None:
    """Each rank rounds its own share, by other scales than the whole has."""
    make("qwen3_moe", tmp_path, **(SIZES | FAMILIES["qwen3_moe"]))
    want = from_files(tmp_path, rounded(8)).feed(TOKENS)

    def feed(rank: Communicator) -> Tensor:
        return from_files(tmp_path, rounded(8), communicator=rank).feed(TOKENS)

    for found in on_ranks(2, feed):
        assert far(found, want) < 0.1


def test_a_share_that_cuts_a_group_is_refused(tmp_path: Path) -> None:
    quantize("qwen3_moe", "awq_32", tmp_path, **LAYERS, moe_intermediate_size=32)
    words = r"experts\.0\.down_proj\.weight: inputs \d+ to \d+ cut a group"
    with pytest.raises(CheckpointError, match=words):
        on_ranks(2, lambda rank: load(tmp_path, communicator=rank))


def test_experts_of_no_whole_groups_are_refused_by_key(tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path, **(SIZES | LAYERS))  # 40 inputs
    with pytest.raises(ConfigError, match=r"by groups of 32: 40 inputs") as error:
        from_files(tmp_path, rounded(4))
    assert error.value.key == "quantization"


def test_stages_equal_the_whole(tmp_path: Path) -> None:
    quantize("mixtral", "gptq_4_sym", tmp_path, **LAYERS)
    want = load(tmp_path).feed(TOKENS)
    hidden = None
    for span in ((0, 1), (1, 2)):
        stage = build(config_of(tmp_path, layers=span), KeptWeights)
        SafetensorsLoader(path=str(tmp_path), progress=False).load(stage.model)
        hidden = stage.feed(TOKENS, hidden)
    assert hidden is not None
    assert off(hidden, want) < 1e-5


@pytest.mark.parametrize(
    ("case", "kind"), [("mixtral", "Q4_0"), ("mixtral", "Q8_0"), ("qwen3_moe", "Q5_1")]
)
def test_experts_of_a_gguf(case: str, kind: str, tmp_path: Path) -> None:
    make(case, tmp_path, **(SIZES | FAMILIES[case]))
    file = write(tmp_path, tmp_path / "a.gguf", matrices=gguf.GGMLQuantizationType[kind])

    def read(quantization: Any) -> Running:
        running = build(read_config(file), quantization)
        GgufLoader(path=str(file), cache=None, progress=False).load(running.model)
        return running

    kept, whole = read(KeptWeights), read(NoQuantization)
    assert off(kept.feed(TOKENS), whole.feed(TOKENS)) < 1e-3
    assert expert_bytes(kept) / expert_bytes(whole) < (0.16 if kind == "Q4_0" else 0.29)


def test_an_expert_in_floats_widens_its_layer_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w2"
    plain = torch.zeros(64, 128)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {k: v for k, v in tensors.items() if not k.startswith(f"{name}.")}
        return rest | {f"{name}.weight": plain}

    quantize("mixtral", "gptq_4_sym", tmp_path, change, **LAYERS)
    running = load(tmp_path)
    assert "1 products have weights of which the checkpoint quantizes some" in caplog.text
    widened = build(config_of(tmp_path), NoQuantization)
    loader = SafetensorsLoader(path=str(tmp_path), progress=False, dequantize=True)
    loader.load(widened.model)
    assert off(running.feed(TOKENS), widened.feed(TOKENS)) < 1e-3


def test_what_multiplies_them_is_said_and_an_override_of_it_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``ops.quantized_linear`` of another library multiplies experts too."""
    make("mixtral", tmp_path, **(SIZES | LAYERS))
    seen: list[int] = []

    class Counted(TorchOps):
        def quantized_linear(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
            seen.append(x.shape[0])
            return super().quantized_linear(x, *more, **named)

    table = SelectedOps(library(ISAS[0]), quantized_linear=Counted())
    with caplog.at_level(logging.INFO):
        running = from_files(tmp_path, rounded(8), table=table)
    assert "experts of 2 layers are quantised: ops.quantized_linear and" in caplog.text
    assert "the model cannot be captured: quantised experts ask the host" in caplog.text
    assert "capture" not in running.model.reuses
    running.feed(TOKENS[:3])
    assert len(seen) > 2 * 3 + 1  # attention, routers and head
