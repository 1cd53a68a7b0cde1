"""A broken or hostile config.json is an error of ours, in one line, whatever its values are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.models.checkpoints import make

from vllm_di import LLM
from vllm_di.containers.assembly import assemble
from vllm_di.errors import CheckpointError, VllmDiError

PLAIN = [
    "tokenizer=bytes",
    "tokenizer.vocab_size=99",
    "model.dtype=float32",
    "worker.num_blocks=64",
]
KEYS = [
    "architectures",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_parameters",
    "rope_scaling",
    "layer_types",
    "eos_token_id",
    "quantization_config",
    "tie_word_embeddings",
]
VALUES: dict[str, str] = {
    "null": "null",
    "negative": "-1",
    "zero": "0",
    "huge": "1" + "0" * 30,
    "large": "4000000000000",
    "fraction": "0.5",
    "infinite": "1e999",
    "NaN": "NaN",
    "text": '"x"',
    "interpolation": '"${oc.env:HOME}"',
    "list": "[1, 2]",
    "mixed list": '[null, {"a": []}, "y"]',
    "object": '{"rope_type": "yarn", "factor": "x"}',
    "deep": "[" * 400 + "]" * 400,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    make("llama2", folder)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", KEYS)
def test_a_value_is_taken_or_refused_in_one_line(
    key: str, value: str, config: tuple[Path, dict[str, Any]]
) -> None:
    folder, whole = config
    rest = json.dumps({k: v for k, v in whole.items() if k != key})
    (folder / "config.json").write_text(f'{rest[:-1]}, "{key}": {VALUES[value]}}}')
    message = ""
    try:
        with LLM(str(folder), overrides=PLAIN) as llm:
            assert llm.engine.report.vocab_size > 0
    except VllmDiError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000
    assert repr(os.environ.get("HOME", "/root")) not in message, "interpolated"


FILES: dict[str, bytes] = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "not UTF-8": b'\xff\xfe{"a": 1}',
    "deep": b'{"a": ' + b"[" * 200_000,
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "nothing inside": b"{}",
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", FILES)
def test_a_broken_file_is_named(text: str, file: str, tmp_path: Path) -> None:
    make("llama2", tmp_path)
    (tmp_path / file).write_bytes(FILES[text])
    if file == "generation_config.json" and text == "nothing inside":
        return
    with pytest.raises(CheckpointError, match=r"config.json"):
        assemble(["model=local", f"model.path={tmp_path}"])


def test_the_command_line_prints_no_traceback(tmp_path: Path) -> None:
    make("llama2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in {"num_attention_heads": "x", "vocab_size": 10**15}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        command = [sys.executable, "-m", "vllm_di.cli", "complete", "a", "model=local"]
        command += [f"model.path={tmp_path}", *PLAIN]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()[-1]) < 1000
