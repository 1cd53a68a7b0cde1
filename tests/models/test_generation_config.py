"""``generation_config.json``: defaults of requests, never over what a request says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.models.checkpoints import make

from vllm_di import LLM, SamplingParams
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.errors import CheckpointError, ConfigError
from vllm_di.frontend.requests import fitted
from vllm_di.models.generation_config import NAMES, sampling_defaults
from vllm_di.models.hf_config import model_fields

WHOLE: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 1,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 5,
    "eos_token_id": [2, 3],
    "transformers_version": "5.0.0",
    "_from_model_config": True,
}
PARAMS: dict[str, Any] = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 1,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_tokens": 5,
}


def checkpoint(folder: Path, generation: dict[str, Any]) -> list[str]:
    """Overrides that serve it."""
    make("llama_gqa_tied", folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return [
        "model=local",
        f"model.path={folder}",
        "tokenizer=bytes",
        "chat_template=plain",
        "platform=cpu",
        "tokenizer.vocab_size=256",
    ]


def test_all_values_are_read() -> None:
    assert set(PARAMS) == {name for name, _ in NAMES.values()}
    assert sampling_defaults(WHOLE, "x") == (PARAMS, [])
    assert sampling_defaults({"temperature": None, "top_k": 20.0}, "x") == ({"top_k": 20}, [])


def test_what_is_not_supported_is_named() -> None:
    more = {"no_repeat_ngram_size": 3, "num_beams": 4, "typical_p": 1.0, "bad_words_ids": None}
    assert sampling_defaults(more, "x") == ({}, ["no_repeat_ngram_size=3", "num_beams=4"])


OF_NO_USE: list[Any] = ["hot", True, [1], {}, float("nan")]
HOSTILE: list[tuple[str, Any]] = [
    *((key, value) for key in NAMES for value in OF_NO_USE),
    *((key, -3) for key in NAMES),
    *((key, float("inf")) for key in NAMES),
    ("top_p", 1.5),
    ("top_k", 1.5),
    ("top_k", 10**30),
    ("max_new_tokens", 0),
    ("temperature", 10**400),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_hostile_values_are_an_error_of_one_line(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^x: {key}: .*generation_config=none$") as caught:
        sampling_defaults({key: value}, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", ["</s>", [1, "x"], True, 1.5, 10**30])
def test_hostile_ends_are_an_error(ids: Any, tmp_path: Path) -> None:
    make("llama_gqa_tied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(CheckpointError, match="eos_token_id is"):
        model_fields(config, {"eos_token_id": ids})


def test_the_config_chooses_and_explain_shows(tmp_path: Path) -> None:
    overrides = checkpoint(tmp_path, WHOLE | {"no_repeat_ngram_size": 3})
    told = assemble(overrides)
    assert told.server["server"]["sampling"] == PARAMS
    assert [w for w in told.warnings if "no_repeat_ngram_size=3" in w]
    assert explain(told, ops=False).sampling == PARAMS
    none = assemble([*overrides, "generation_config=none"])
    assert none.server["server"]["sampling"] == {}
    assert explain(none, ops=False).sampling == {}
    assert none.stages[0]["model"]["eos_token_ids"] == told.stages[0]["model"]["eos_token_ids"]
    with pytest.raises(ConfigError, match=r"generation_config: .*got 'chekpoint'; did you mean"):
        assemble([*overrides, "generation_config=chekpoint"])


def test_a_hostile_file_stops_the_start_unless_it_is_left_out(tmp_path: Path) -> None:
    overrides = checkpoint(tmp_path, {"temperature": -1})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature: .*got -1"):
        assemble(overrides)
    assemble([*overrides, "generation_config=none"])


def test_the_library_takes_them_where_no_params_are_given(tmp_path: Path) -> None:
    overrides = [*checkpoint(tmp_path, WHOLE), "ops=torch", "attention=sdpa"]
    prompt = [list(range(4, 20))]
    with LLM(overrides=overrides) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(**PARAMS)
        answers = {tuple(o.outputs[0].token_ids) for o in llm.generate(prompt * 4)}
        assert len(answers) == 1, "top_k=1 leaves no choice"
        assert len(next(iter(answers))) <= 5
        params = SamplingParams(temperature=100.0, max_tokens=12, ignore_eos=True)
        free = {tuple(o.outputs[0].token_ids) for o in llm.generate(prompt * 4, params)}
        assert len(free) > 1
        assert {len(ids) for ids in free} == {12}


def test_a_default_length_bows_to_the_context() -> None:
    params = SamplingParams(max_tokens=None)
    assert fitted(params, 10, 64, 2048).max_tokens == 54
    assert fitted(params, 10, 64, 5).max_tokens == 5
    assert fitted(params, 10, 64).max_tokens == 54
    assert fitted(SamplingParams(max_tokens=None, min_tokens=9), 10, 64, 5).max_tokens == 9
    assert fitted(SamplingParams(max_tokens=7), 10, 64, 5).max_tokens == 7
