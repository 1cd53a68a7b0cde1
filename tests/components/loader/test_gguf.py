"""GGUF files: every type of tensor, every family, every way to be broken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.models.checkpoints import make
from tests.models.gguf_files import can_quantize, finish, quantized, write
from tests.models.runner import BLOCK, Running, attention, device, ops
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_di.cache import is_whole
from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.gguf import GgufLoader
from vllm_di.components.loader.gguf_blocks import FLOATS
from vllm_di.components.loader.gguf_tensors import metadata, open_gguf, read_gguf
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.models.gguf_config import CLASSES, end_tokens, hf_config
from vllm_di.models.hf_config import model_fields

KINDS = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K Q2_K Q3_K".split()  # noqa: SIM905
TOKENS = [(7 * i * i + 3 * i) % 97 + 1 for i in range(40)]
FACTOR = 8.0


def llama3_divisors() -> list[float]:
    """As llama.cpp's converter computes them for 4 pairs, factor 8, contexts of 8192 before."""
    found = []
    for pair in range(4):
        wavelength = 2 * np.pi * 500000.0 ** (2 * pair / 8)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(FACTOR)
        else:
            found.append(1 / ((1 - smooth) / FACTOR + smooth))
    return found


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": FACTOR,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: list[tuple[str, dict[str, Any], dict[str, list[float]]]] = [
    ("llama_gqa_tied", {}, {}),
    ("llama_biases", {"mlp_bias": False}, {}),
    ("llama_linear_rope", {}, {}),
    ("llama_yarn", {}, {}),
    ("llama2", {"rope_parameters": LLAMA3}, {"rope_freqs.weight": llama3_divisors()}),
    ("mistral_window", {}, {}),
    ("qwen2", {}, {}),
    ("qwen3", {}, {}),
    ("granite", {}, {}),
    ("smollm3", {"no_rope_layer_interval": 4}, {}),
    ("phi3", {}, {}),
    (
        "phi3_longrope",
        {"sliding_window": None},
        {
            "rope_factors_short.weight": [1.0, 1.1, 1.2, 1.3],
            "rope_factors_long.weight": [2.0, 2.1, 2.2, 2.3],
        },
    ),
    ("gemma2", {"query_pre_attn_scalar": 16}, {}),
    ("gemma3", {"query_pre_attn_scalar": 16}, {}),
    ("mixtral", {}, {}),
    ("qwen3_moe", {}, {}),
]


def decoder(config: DecoderConfig) -> tuple[Decoder, Running]:
    on = device()
    table = ops("torch", on)
    layout = HndLayout(on, block_size=BLOCK, dtype="auto")
    backend = attention("sdpa", table, layout)
    model = Decoder(
        on,
        table,
        backend,
        SingleCommunicator(Placement()),
        NoQuantization(table),
        config=config,
    )
    return model, Running(model, backend, layout)


def read_config(file: Path) -> DecoderConfig:
    reader = open_gguf(file)
    tensors = {t.name: t for t in reader.tensors}
    config = hf_config(
        metadata(reader),
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tied="output.weight" not in tensors,
        vector=lambda name: tensors[name].data.tolist() if name in tensors else None,
    )
    return DecoderConfig(dtype="float32", **model_fields(config))


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_tensor(kind: str, tmp_path: Path) -> None:
    want = quantized(tmp_path / "a.gguf", gguf.GGMLQuantizationType[kind])
    assert torch.isfinite(want).all()
    assert want.abs().max() > 0
    [(name, got)] = list(read_gguf(tmp_path / "a.gguf", torch.float32))
    assert isinstance(got, torch.Tensor)
    assert name == "lm_head.weight"
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    if can_quantize(gguf.GGMLQuantizationType[kind]):
        values = np.random.default_rng(1).standard_normal((3, 512), np.float32)
        assert np.abs(got.numpy() - values).max() < 0.5
    [(_, half)] = list(read_gguf(tmp_path / "a.gguf", torch.bfloat16))
    torch.testing.assert_close(half, want.bfloat16(), rtol=0, atol=0)
    [(_, kept)] = list(read_gguf(tmp_path / "a.gguf", torch.bfloat16, keep=True))
    if kind in FLOATS:
        assert isinstance(kept, torch.Tensor)
        return
    assert isinstance(kept, QuantizedWeight)
    again = kept.dequantize(torch.float32)
    exact = kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    bound = 0.0 if exact else 2**-10 if kind == "Q4_K" else 2**-7  # of the largest weight
    assert (again - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize(("case", "more", "extra"), FAMILIES)
def test_every_family_equals_its_safetensors(
    case: str, more: dict[str, Any], extra: dict[str, list[float]], tmp_path: Path
) -> None:
    theirs = make(case, tmp_path, **more)
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0]
    file = write(tmp_path, tmp_path / "a.gguf", extra)
    model, running = decoder(read_config(file))
    GgufLoader(path=str(file), cache=None, progress=False).load(model)
    got = running.feed(TOKENS)
    assert float((got - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))


def test_the_conversion_is_read_from_the_cache(tmp_path: Path) -> None:
    make("llama_gqa_tied", tmp_path)
    file = write(tmp_path, tmp_path / "a.gguf")
    cache = tmp_path / "cache"
    cache.mkdir()
    loader = GgufLoader(path=str(file), cache=str(cache), progress=False)
    model, running = decoder(read_config(file))
    loader.load(model)
    want = running.feed(TOKENS)
    [cached] = cache.glob("*.safetensors")
    stamp = cached.stat().st_mtime_ns

    def again() -> torch.Tensor:
        model, running = decoder(read_config(file))
        loader.load(model)
        return running.feed(TOKENS)

    assert torch.equal(again(), want)
    assert cached.stat().st_mtime_ns == stamp
    os.truncate(cached, cached.stat().st_size - 9)  # a full disk, say: converted again
    assert torch.equal(again(), want)
    assert is_whole(cached)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    make("llama_gqa_tied", tmp_path)
    file = write(tmp_path, tmp_path / "a.gguf")
    model, _ = decoder(read_config(file))
    (tmp_path / "no").write_text("a file")
    GgufLoader(path=str(file), cache=str(tmp_path / "no" / "such"), progress=False).load(model)
    assert model.weight_bytes() > 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 0.999])
def test_a_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    make("llama_gqa_tied", tmp_path)
    file = write(tmp_path, tmp_path / "a.gguf")
    model, _ = decoder(read_config(file))
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(CheckpointError, match=r"a\.gguf: damaged or truncated"):
        GgufLoader(path=str(file), cache=None, progress=False).load(model)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    quantized(tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q8_0)
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    place = data.index(b"output.weight") + len(b"output.weight") + 4 + 2 * 8
    assert data[place] == gguf.GGMLQuantizationType.Q8_0
    data[place] = 200
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.gguf: damaged.*tensor output\.weight: .*200"):
        list(read_gguf(tmp_path / "a.gguf", torch.float32))


def test_shapes_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    import msgspec

    make("llama_gqa_tied", tmp_path)
    file = write(tmp_path, tmp_path / "a.gguf")
    config = msgspec.structs.replace(read_config(file), intermediate_size=64)
    model, _ = decoder(config)
    with pytest.raises(CheckpointError, match=r"a\.gguf: tensor .*down_proj.* has shape \[48, 72"):
        GgufLoader(path=str(file), cache=None, progress=False).load(model)


def test_unknown_tensors_and_architectures_are_named(tmp_path: Path) -> None:
    def one(name: str, architecture: str) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", architecture)
        writer.add_tensor(name, np.zeros((2, 2), np.float32))
        return finish(writer, tmp_path / "a.gguf")

    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_in\.weight is unknown in a llama file"):
        list(read_gguf(one("blk.0.ssm_in.weight", "llama"), torch.float32))
    with pytest.raises(CheckpointError, match=r"architecture 'mamba' are not supported.*llama"):
        list(read_gguf(one("output.weight", "mamba"), torch.float32))


def test_no_file_is_an_error(tmp_path: Path) -> None:
    model, _ = decoder(DecoderConfig(**TINY))
    with pytest.raises(CheckpointError, match=r"set model\.path"):
        GgufLoader(path=None, cache=None, progress=False).load(model)
    with pytest.raises(CheckpointError, match=r"none\.gguf: no such file"):
        GgufLoader(path=str(tmp_path / "none.gguf"), cache=None, progress=False).load(model)


TINY: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
FACTS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 8,
    "llama.block_count": 1,
    "llama.attention.head_count": 1,
    "llama.context_length": 16,
}


def test_divisors_that_are_not_llama3s_are_refused() -> None:
    wrong = [1.0, 1.0, 1.5, FACTOR]
    with pytest.raises(UnsupportedModelError, match="not Llama 3's"):
        hf_config(
            FACTS,
            vocab_size=8,
            tied=True,
            vector=lambda name: wrong if name == "rope_freqs.weight" else None,
        )


def test_an_unknown_scaling_is_refused() -> None:
    facts = FACTS | {"llama.rope.scaling.type": "dynamic-ntk"}
    with pytest.raises(UnsupportedModelError, match="dynamic-ntk"):
        hf_config(facts, vocab_size=8, tied=True, vector=lambda name: None)


@pytest.mark.parametrize("arch", [*CLASSES, "llama with experts", "llama with a window"])
def test_transformers_knows_the_written_config_by_its_type(arch: str) -> None:
    arch, _, kind = arch.partition(" ")
    more = {"with experts": "llama.expert_count", "with a window": "llama.attention.sliding_window"}
    facts = {key.replace("llama", arch): value for key, value in FACTS.items()}
    facts |= {"general.architecture": arch} | ({more[kind]: 4} if kind else {})
    config = hf_config(facts, vocab_size=8, tied=True, vector=lambda name: None)
    [name] = config["architectures"]
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]] == name


def test_the_large_gemmas_scale_by_the_width_of_a_head() -> None:
    facts = {key.replace("llama", "gemma3"): value for key, value in FACTS.items()} | {
        "general.architecture": "gemma3",
        "gemma3.embedding_length": 5376,
        "gemma3.attention.head_count": 32,
        "gemma3.attention.key_length": 128,
        "gemma3.block_count": 62,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    }
    config = hf_config(facts, vocab_size=8, tied=True, vector=lambda name: None)
    assert config["query_pre_attn_scalar"] == 168
    smaller = facts | {"gemma3.block_count": 48}
    config = hf_config(smaller, vocab_size=8, tied=True, vector=lambda name: None)
    assert config["query_pre_attn_scalar"] == 128


def test_all_ends_of_an_answer_are_found() -> None:
    facts = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7}
    assert end_tokens(facts) == [5, 7]
    assert end_tokens({"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eom_token_id": 5}) == [5]
