"""Scores of cross-encoders beside transformers: the same pair template, token types, head and
activation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.cross_encoders import SHAPE, CrossEncoder, make

from vllm_di import LLM
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.errors import CheckpointError, ConfigError, RequestError, UnsupportedModelError
from vllm_di.models.encoder_config import encoder_fields
from vllm_di.models.pooling_config import pooling_of

FP32 = ["platform=cpu", "model.dtype=float32"]
ONES = ["w5 w6", "w9 " * 40, "", "w5 w6", "w7"]
OTHERS = ["w7", "w1 w2 w3 " * 20, "w4 w200", "w7 w7", "w5 w6"]
KINDS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {"type_vocab_size": 1},
    "XLMRoberta": {"type_vocab_size": 1},
}
STATIC = [
    *("graph=eager", "limits.mixed_steps=false", "limits.drafts=false"),
    *("limits.max_prefill_rows=2", "shapes=grid", "shapes.decode_seqs=[4]"),
    *("shapes.prefill_seqs=[2]", "shapes.prefill_queries=[130]", "shapes.columns=[9]"),
    *("scheduler.max_num_seqs=4", "scheduler.max_num_batched_tokens=260"),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CrossEncoder]:
    folder = tmp_path_factory.mktemp("cross")
    return folder, make("Bert", folder)


def check(llm: LLM, it: CrossEncoder, ones: list[str], others: list[str], **cut: Any) -> None:
    """Each pair's tokens and score; a pair's neighbours in the step make no difference."""
    theirs = {"truncation": True, "max_length": cut["truncate_prompt_tokens"]} if cut else {}
    outputs = llm.score(ones, others, **cut)
    for output, one, other in zip(outputs, ones, others, strict=True):
        ids, logit = it.logit(one, other, **theirs)
        assert output.prompt_token_ids == ids
        assert output.outputs.score == pytest.approx(float(logit.sigmoid()), abs=1e-5)
    assert len({round(output.outputs.score, 4) for output in outputs}) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    it = make(kind, tmp_path, **KINDS[kind])
    with LLM(str(tmp_path), overrides=[*FP32, "scheduler.max_num_seqs=3"]) as llm:
        check(llm, it, ONES, OTHERS)
        check(llm, it, ["w3 w8"] * 5, OTHERS)
        alone = [output.outputs.score for output in llm.score("w3 w8", OTHERS)]
        both = [output.outputs.score for output in llm.score(["w3 w8"] * 5, OTHERS)]
        assert alone == pytest.approx(both, abs=1e-6)
        for limit in (5, 7, 10, 31, 90):
            check(llm, it, ONES, OTHERS, truncate_prompt_tokens=limit)


def test_padding_changes_no_score(bert: tuple[Path, CrossEncoder]) -> None:
    folder, it = bert
    with LLM(str(folder), overrides=[*FP32, *STATIC]) as llm:
        check(llm, it, ONES, OTHERS)


def test_the_types_of_tokens_count(bert: tuple[Path, CrossEncoder]) -> None:
    """Without them two texts would be one, and these scores alike."""
    folder, it = bert
    tokenizer = HfTokenizer(path=str(folder))
    pair = tokenizer.encode_pair("w5 w6", "w7")
    assert pair.type_ids == [0, 0, 0, 0, 1, 1]
    with torch.no_grad():
        bare = it.model(torch.tensor([pair.token_ids])).logits[0, 0].sigmoid()
    with LLM(str(folder), overrides=FP32) as llm:
        (output,) = llm.score("w5 w6", "w7")
    assert abs(output.outputs.score - float(bare)) > 1e-3


@pytest.mark.parametrize(
    ("settings", "is_sigmoid"),
    [
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
            True,
        ),
    ],
)
def test_the_activation_is_the_checkpoints(
    settings: dict[str, Any], is_sigmoid: bool, bert: tuple[Path, CrossEncoder], tmp_path: Path
) -> None:
    folder, it = bert
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    _, logit = it.logit("w5", "w6")
    wanted = logit.sigmoid() if is_sigmoid else logit
    with LLM(str(tmp_path), overrides=FP32) as llm:
        (output,) = llm.score("w5", "w6")
        assert output.outputs.score == pytest.approx(float(wanted), abs=1e-5)
        with pytest.raises(RequestError, match="is a cross-encoder: it scores pairs"):
            llm.embed("w5")
        with pytest.raises(RequestError, match="expected texts, not token ids"):
            llm.score([[5]], [[6]])
        with pytest.raises(RequestError, match="a pair of texts has"):
            llm.score("w5", "w6 " * 200)
        with pytest.raises(RequestError, match="no room"):
            llm.score("w5", "w6", truncate_prompt_tokens=3)
        assert len(llm.score("w5", "w6")) == 1


def test_a_user_may_choose_the_activation(bert: tuple[Path, CrossEncoder]) -> None:
    folder, it = bert
    with LLM(str(folder), overrides=[*FP32, "pooler=score", "pooler.activation=identity"]) as llm:
        (output,) = llm.score("w5", "w6")
    assert output.outputs.score == pytest.approx(float(it.logit("w5", "w6")[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pooler=mean"], "is a cross-encoder, whose head scores.*take pooler=score"),
        (["pooler=none"], "generates no text; take pooler=score"),
        (["attention=paged"], "PagedAttention cannot do that; take attention=sdpa"),
    ],
    ids=str,
)
def test_what_a_cross_encoder_cannot_do(
    overrides: list[str], words: str, bert: tuple[Path, CrossEncoder]
) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(str(bert[0]), overrides=[*FP32, *overrides])


def test_a_model_without_such_a_head() -> None:
    overrides = ["platform=cpu", "model.dtype=float32", "pooler=score"]
    with pytest.raises(ConfigError, match=r"has no head that scores.*pooler=mean, cls or last"):
        LLM("tiny", overrides=overrides)


def test_a_head_that_lacks_a_tensor(bert: tuple[Path, CrossEncoder], tmp_path: Path) -> None:
    folder = bert[0]
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: classifier\.weight"):
        LLM(str(tmp_path), overrides=FP32)


NAME = "BertForSequenceClassification"


@pytest.mark.parametrize(
    "labels",
    [{}, {"num_labels": 3}, {"id2label": {"0": "a", "1": "b"}}, {"num_labels": "x"}],
    ids=str,
)
def test_classifiers_of_several_labels_are_refused(labels: dict[str, Any]) -> None:
    config = {k: v for k, v in SHAPE.items() if k != "num_labels"} | {"architectures": [NAME]}
    with pytest.raises(UnsupportedModelError, match=f"{NAME} with num_labels="):
        encoder_fields(config | labels)
    assert encoder_fields(config | {"id2label": {"0": "LABEL_0"}})["architecture"] == NAME


def test_activations(tmp_path: Path) -> None:
    config: dict[str, Any] = {"architectures": [NAME]}
    found = pooling_of(str(tmp_path), config)
    assert (found.option, found.activation) == ("score", "sigmoid")
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps({"activation_fn": "torch.nn.modules.linear.Identity"}))
    assert pooling_of(str(tmp_path), config).activation == "identity"
    odd = config | {"sbert_ce_default_activation_function": "os.system"}
    with pytest.raises(UnsupportedModelError, match=r"'os\.system'; known are"):
        pooling_of(str(tmp_path), odd)


def test_the_byte_tokenizers_pairs() -> None:
    tokenizer = BytesTokenizer(vocab_size=300)
    assert tokenizer.encode_pair("a", "bc") == ([256, 97, 257, 98, 99, 257], [0, 0, 0, 1, 1, 1])
    cut = tokenizer.encode_pair("aaaa", "bbb", max_tokens=7, max_other=2)
    assert cut.token_ids == [256, 97, 97, 257, 98, 98, 257]
    assert tokenizer.encode_pair("a", "b", add_special_tokens=False) == ([97, 98], [0, 1])


def test_pairs_without_special_tokens(bert: tuple[Path, CrossEncoder]) -> None:
    tokenizer = HfTokenizer(path=str(bert[0]))
    whole = tokenizer.encode_pair("w1 w2 w3", "w4 w5", add_special_tokens=False)
    assert whole.type_ids == [0, 0, 0, 1, 1]
    cut = tokenizer.encode_pair("w1 w2 w3", "w4 w5", add_special_tokens=False, max_tokens=3)
    assert cut.token_ids == [*whole.token_ids[:2], whole.token_ids[3]]
    assert cut.type_ids == [0, 0, 1]
    few = tokenizer.encode_pair("w1", "w4 w5", max_other=1)
    assert few.type_ids == [0, 0, 0, 1, 1]
