"""No tensor of a checkpoint is dropped or replaced without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models import families
from tests.models.checkpoints import make
from tests.models.runner import load

from vllm_di.components.loader.safetensors import INDEX, find_files, read_files
from vllm_di.errors import CheckpointError

TOKENS = [(5 * i * i + i) % 97 + 1 for i in range(20)]


def add(folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors") -> None:
    path = folder / file
    old = load_file(path) if path.exists() else {}
    save_file(old | tensors, path, metadata={"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    """As transformers reads the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        out: torch.Tensor = model.eval()(torch.tensor([TOKENS])).logits[0]
    return out


@pytest.mark.parametrize("case", ["llama_gqa_tied", "qwen2", "smollm3", "gemma2"])
@pytest.mark.parametrize("kind", ["own", "equal"])
def test_a_head_beside_a_tied_config(
    case: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(case, tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    head = table.clone() if kind == "equal" else torch.randn(table.shape)
    add(tmp_path, {"lm_head.weight": head})
    running = load(tmp_path)
    assert float((running.feed(TOKENS) - logits(tmp_path)).abs().max()) < 1e-3
    words = (
        "head is used" if kind == "own" else "lm_head.weight (equal to model.embed_tokens.weight)"
    )
    assert words in caplog.text


def test_a_head_beside_a_tied_config_on_transformers_code(tmp_path: Path) -> None:
    families.make("gemma", tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    add(tmp_path, {"lm_head.weight": torch.randn(table.shape)})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.set_attn_implementation("eager")
    got = families.run(families.load(tmp_path), families.steps())
    for one, other in zip(got, families.own_logits(theirs), strict=True):
        assert float((one - other).abs().max()) < 1e-3 * float(other.abs().max())


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("llama2", tmp_path)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    add(tmp_path, {name: torch.ones(4) for name in names})
    load(tmp_path)
    assert "4 tensors are left out: model.layers.*.self_attn.rotary_emb.inv_freq (4)" in caplog.text


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_integers_are_no_weights(name: str, tmp_path: Path) -> None:
    """Nothing in config.json says that they are quantised."""
    make("llama2", tmp_path)
    shape = load_file(tmp_path / "model.safetensors")[name].shape
    add(tmp_path, {name: torch.ones(shape, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=rf"{name} is int8, expected floats"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (5,)),
        ("model.layers.0.mlp.rotary_emb.inv_freq", (4,)),
        ("model.vision_tower.weight", (3, 3)),
        ("model.layers.0.vision_gate.weight", (3, 3)),
        ("vision_tower.patch.weight", (3, 3)),
        ("lm_head.bias", (99,)),
        ("model.layers.0.self_attn.q_proj.weight_scale", (1,)),
    ],
)
def test_no_tensor_is_skipped_for_its_name(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    make("llama2", tmp_path)
    add(tmp_path, {name: torch.ones(shape)})
    with pytest.raises(
        CheckpointError, match=rf"tensor {name} is in the checkpoint but not in the"
    ):
        load(tmp_path)


def test_a_vision_tower_of_gemma3_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make("gemma3", tmp_path)
    add(tmp_path, {"vision_tower.x.weight": torch.ones(3), "vision_tower.y.weight": torch.ones(3)})
    load(tmp_path)
    assert "vision_tower.x.weight, vision_tower.y.weight" in caplog.text


def test_layers_beyond_those_that_run_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make("llama2", tmp_path)
    load(tmp_path, num_hidden_layers=2)
    assert "model.layers.*.mlp.up_proj.weight (2)" in caplog.text


def test_other_stages_tensors_are_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("llama2", tmp_path)
    for layers in ((0, 2), (2, 4)):
        load(tmp_path, layers=layers)
    assert "left out" not in caplog.text


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    make("llama2", tmp_path)
    add(tmp_path, {"language_model.model.norm.weight": torch.ones(48)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight comes twice"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------
# which files are the model


def other(folder: Path, file: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: torch.randn_like(v) for k, v in tensors.items()}, folder / file)


@pytest.mark.parametrize(
    "stray",
    [
        "old_backup.safetensors",
        "adapter.safetensors",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "zz.safetensors",
    ],
)
def test_a_stray_file_is_not_read(
    stray: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make("llama2", tmp_path)
    other(tmp_path, stray)
    assert find_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert f"not read, as none of the model: {stray}" in caplog.text
    assert float((load(tmp_path).feed(TOKENS) - logits(tmp_path)).abs().max()) < 1e-3


def sharded(folder: Path) -> None:
    make("llama2", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / INDEX).is_file()
    assert len(list(folder.glob("*.safetensors"))) > 2


def test_a_stray_file_beside_shards_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded(tmp_path)
    want = find_files(tmp_path)
    save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    assert find_files(tmp_path) == want
    assert "not read, as none of the model: consolidated.safetensors" in caplog.text
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"several files: consolidated.safetensors, model-"):
        find_files(tmp_path)
    (tmp_path / "consolidated.safetensors").unlink()
    assert find_files(tmp_path) == want  # one whole set of shards
    want[1].unlink()
    with pytest.raises(CheckpointError, match=r"of \d+ shards 1 are missing, .* number 2"):
        find_files(tmp_path)


def test_an_index_and_a_whole_model_are_two_models(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="which is the model"):
        find_files(tmp_path)


def test_a_tensor_in_two_files_names_both(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, *_, last = find_files(tmp_path)
    name = next(iter(load_file(first)))
    add(tmp_path, {name: load_file(first)[name]}, last.name)
    with pytest.raises(CheckpointError, match=rf"{last.name}: tensor .* twice: .*{first.name} too"):
        load(tmp_path)


def test_a_file_named_often_is_read_once(tmp_path: Path) -> None:
    sharded(tmp_path)
    names = [name for name, _ in read_files(find_files(tmp_path))]
    assert len(names) == len(set(names))


HOSTILE_INDEX: list[Any] = [
    "",
    "[]",
    "null",
    "{}",
    '{"weight_map": null}',
    '{"weight_map": {}}',
    '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": null, "b": "x"}}',
    '{"weight_map": {"a": ["x"]}}',
    '{"weight_map": {"a": "../x.safetensors"}}',
    '{"weight_map": {"a": "/etc/passwd"}}',
    '{"weight_map": ' + "[" * 100_000,
    '{"weight_map": ' + "9" * 10_000 + "}",
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("index", range(len(HOSTILE_INDEX)))
def test_a_broken_index_is_one_error(index: int, tmp_path: Path) -> None:
    text = HOSTILE_INDEX[index]
    (tmp_path / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json: "):
        find_files(tmp_path)


HEADERS: list[bytes] = [
    b"",
    b"\x00" * 8,
    b"\xff" * 8,
    (2**40).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]",
    (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4000]}}   ',
    (62).to_bytes(8, "little") + b'{"a":{"dtype":"NO","shape":[99999999999],"data_offsets":[0,4]}}',
    (50_000).to_bytes(8, "little") + b"[" * 50_000,
]


@pytest.mark.parametrize("header", range(len(HEADERS)))
def test_a_broken_header_is_one_error(header: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HEADERS[header])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged or truncated"):
        list(read_files(find_files(tmp_path)))
