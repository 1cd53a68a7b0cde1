"""A model class of the user's own: the page's example runs as it stands, and nothing takes its
place."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor

from vllm_di import LLM, SamplingParams
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.errors import ConfigError, VllmDiError

PAGE = Path(__file__).parents[2] / "docs/own-model.md"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PLAIN = ["model=local", "tokenizer=bytes", "tokenizer.vocab_size=300", "model.dtype=float32"]
TRUST = ["trust=[mymodels]"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's two files, importable."""
    blocks = re.findall(r"```\w+\n# (mymodels/\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == [
        "mymodels/tinygpt.py",
        "mymodels/conf/model/tinygpt.yaml",
    ]
    for name, text in {"mymodels/__init__.py": "", **dict(blocks)}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mymodels/mine.py").write_text(
        "from vllm_di.models.decoder import Decoder\n\n\nclass MyDecoder(Decoder):\n"
        "    families = (*Decoder.families, 'MineForCausalLM')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "mymodels/conf"
    for module in [m for m in sys.modules if m.split(".")[0] == "mymodels"]:
        del sys.modules[module]


def checkpoint(folder: Path, architecture: str = "TinyGptForCausalLM") -> dict[str, Tensor]:
    folder.mkdir()
    config = {"architectures": [architecture], "eos_token_id": 2, "dtype": "float32", **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {"wte": (300, 32), "wpe": (64, 32)}
    for i in range(2):
        shapes |= {f"{i}.qkv": (96, 32), f"{i}.out": (32, 32)}
        shapes |= {f"{i}.up": (128, 32), f"{i}.down": (32, 128)}
    weights = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return weights


def reference(w: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """-> logits of the last token, by dense attention over the whole sequence."""
    x = w["wte"][tokens] + w["wpe"][: len(tokens)]
    for i in range(2):
        q, k, v = F.linear(F.layer_norm(x, (32,)), w[f"{i}.qkv"]).chunk(3, -1)
        q, k, v = (part.view(len(tokens), 4, 8).transpose(0, 1) for part in (q, k, v))
        seen = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + F.linear(seen.transpose(0, 1).reshape(x.shape), w[f"{i}.out"])
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (32,)), w[f"{i}.up"])), w[f"{i}.down"])
    return F.linear(F.layer_norm(x, (32,))[-1], w["wte"])


def target(assembly: Assembly) -> str:
    return str(assembly.stages[0]["model"]["_target_"])


def test_the_page_s_model_is_found_and_gives_its_own_tokens(package: Path, tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "gpt")
    prompts = [list(range(3, 33)), list(range(100, 110))]
    overrides = [*PLAIN, *TRUST, f"model.path={tmp_path / 'gpt'}"]
    overrides += ["scheduler.max_num_batched_tokens=16", "scheduler.max_num_seqs=4"]
    with LLM(overrides=overrides, config_dirs=[package]) as llm:
        choice = llm.assembly.choices["model"]
        assert (choice.option, choice.origin.chosen_by) == ("tinygpt", "checkpoint")
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        )
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(reference(weights, tokens).argmax()))
        assert output.outputs[0].token_ids == tokens[len(prompt) :]


def test_an_option_is_for_what_it_registers(package: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "gpt", "OtherForCausalLM")
    overrides = ["model=tinygpt", *TRUST, f"model.path={tmp_path / 'gpt'}"]
    with pytest.raises(ConfigError, match=r"is for TinyGptForCausalLM, but .*OtherForCausalLM"):
        assemble(overrides, [package])


def test_two_options_that_register_one_architecture(package: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "gpt")
    text = (package / "model/tinygpt.yaml").read_text()
    (package / "model/twin.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"several options: model=tinygpt .*model=twin .*name"):
        assemble(["model=local", *TRUST, f"model.path={tmp_path / 'gpt'}"], [package])


def test_a_native_architecture_stays_native(
    package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "a")
    text = (package / "model/tinygpt.yaml").read_text()
    text = text.replace("[TinyGptForCausalLM]", "[LlamaForCausalLM]")
    (package / "model/tinygpt.yaml").write_text(text)
    found = assemble(["model=local", f"model.path={tmp_path / 'a'}"], [package])
    assert target(found) == "vllm_di.models.decoder.Decoder"
    assert "registers LlamaForCausalLM, which the shipped decoder runs" in caplog.text


@pytest.mark.parametrize("architectures", ["X", "[1]", "{a: b}"])
def test_a_broken_registration_stops_nothing_else(
    architectures: str, package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(tmp_path / "gpt")
    text = (package / "model/tinygpt.yaml").read_text()
    broken = text.replace("[TinyGptForCausalLM]", architectures)
    (package / "model/broken.yaml").write_text(broken)
    found = assemble(["model=local", *TRUST, f"model.path={tmp_path / 'gpt'}"], [package])
    assert target(found) == "mymodels.tinygpt.TinyGpt"
    assert re.search(r"broken.yaml:\d+: model.architectures: expected a list", caplog.text)
    with pytest.raises(ConfigError, match=r"model.architectures: expected a list of class names"):
        assemble(["model=broken", *TRUST, f"model.path={tmp_path / 'gpt'}"], [package])


NAMED: dict[str, list[str]] = {
    "command line": ["model=local", "model._target_=mymodels.mine.MyDecoder"],
    "option": ["model=mine"],
}


@pytest.mark.parametrize("how", NAMED)
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MineForCausalLM", "LlamaForCausalLM"])
def test_a_named_class_is_never_replaced(
    how: str, architecture: str, package: Path, tmp_path: Path
) -> None:
    checkpoint(tmp_path / "a", architecture)
    (package / "model/mine.yaml").write_text(
        "defaults: [base, _self_]\n_target_: mymodels.mine.MyDecoder\n"
    )
    path = f"model.path={tmp_path / 'a'}"
    found = assemble([*NAMED[how], *TRUST, path], [package])
    assert target(found) == "mymodels.mine.MyDecoder"
    assert found.stages[0]["model"]["hidden_size"] == 32
    with pytest.raises(ConfigError, match=r"implementation=transformers asks .*MyDecoder"):
        assemble([*NAMED[how], *TRUST, path, "model.implementation=transformers"], [package])


def test_the_shipped_decoder_named_outright_refuses_what_it_lacks(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a", "GPT2LMHeadModel")
    node = "model._target_=vllm_di.models.decoder.Decoder"
    overrides = [*PLAIN, node, f"model.path={tmp_path / 'a'}", "loader=dummy"]
    with pytest.raises(VllmDiError, match=r"'GPT2LMHeadModel' has no native model in Decoder"):
        LLM(overrides=overrides)


def test_transformers_code_may_know_settings_that_ours_does_not(tmp_path: Path) -> None:
    config: dict[str, Any] = transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_sinks": 4}))
    asked = ["model=local", f"model.path={tmp_path}"]
    with pytest.raises(VllmDiError, match=r"model.implementation=transformers"):
        assemble(asked)
    found = assemble([*asked, "model.implementation=transformers"])
    assert target(found).endswith("TransformersModel")
