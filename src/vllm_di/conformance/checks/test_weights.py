"""Every tensor of a checkpoint is taken, and what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from vllm_di.conformance import tiny
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, ask, run
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.errors import CheckpointError

PROMPTS = [[5, 17, 200, 33, 8, 90], [1], list(range(40, 80))]


def score(subject: Subject, folder: Path, *more: str) -> list[Answer]:
    """Log-probs that depend on every weight."""
    dtype = f"model.dtype={subject.exact_dtype}"
    with subject.engine(dtype, *more, model=folder) as engine:
        return run(engine, [ask(p, 2, logprobs=5, prompt_logprobs=0) for p in PROMPTS])


def flat(answers: list[Answer]) -> list[float]:
    return [t.logprobs[0] for a in answers for t in (*a.prompt_logprobs, *a.logprobs)]


@pytest.mark.parametrize("model", ["gqa", "tied", "moe", "bias"])
def test_every_tensor_counts(subject: Subject, record: Record, model: str) -> None:
    """Change one tensor of the file, and the answers change."""
    base = flat(score(subject, subject.model_folder(model)))
    weights = tiny.tensors(model, subject.head_size)
    ignored = []
    # the second layer is like the first
    names = [name for name in weights if "layers.1" not in name]
    if model == "bias":  # the others are those of "gqa"
        names = [name for name in names if name.endswith(".bias")]
    for name in names:
        changed = weights | {name: weights[name].flip(0) * 1.5}
        folder = subject.model_folder(model, weights=changed, variant=f"-{name}")
        if flat(score(subject, folder)) == base:
            ignored.append(name)
    record.figure(tensors=len(names))
    assert not ignored, f"the answers do not depend on {', '.join(ignored)}"


def test_several_files_are_one_checkpoint(subject: Subject) -> None:
    whole = score(subject, subject.model_folder("gqa"))
    parts = score(subject, subject.model_folder("gqa", num_files=4, variant="-parts"))
    assert_same(parts, whole, 0.0, "in four files")


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda w: {k: v for k, v in w.items() if k != name}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (without("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
    "missing head": (without("lm_head.weight"), "lm_head"),
    "misshaped": (
        lambda w: w | {"model.norm.weight": w["model.norm.weight"][:-1].clone()},
        "model.norm",
    ),
    "unexpected": (
        lambda w: w | {"model.layers.0.surprise.weight": w["model.norm.weight"].clone()},
        "surprise",
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_checkpoint_is_refused(subject: Subject, how: str) -> None:
    change, words = WRONG[how]
    weights = change(tiny.tensors("gqa", subject.head_size))
    folder = subject.model_folder("gqa", weights=weights, variant=f"-{how.replace(' ', '-')}")
    with pytest.raises(CheckpointError, match=words):
        score(subject, folder)


def test_a_damaged_file_is_refused(subject: Subject) -> None:
    folder = subject.model_folder("gqa", variant="-damaged")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="safetensors"):
        score(subject, folder)


@pytest.mark.parametrize("option", ["int8", "int4"])
def test_quantised_weights(subject: Subject, record: Record, option: str) -> None:
    """Near the whole ones: off by what 8 or 4 bits cost, no more."""
    if option not in subject.declared.quantization:
        raise NotDeclared(f"quantization={option}")
    record.feature(f"quantization {option}")
    folder = subject.model_folder("gqa")
    whole = flat(score(subject, folder))[: len(PROMPTS[0]) - 1]
    found = flat(score(subject, folder, f"quantization={option}"))[: len(PROMPTS[0]) - 1]
    off = sum(abs(a - b) for a, b in zip(found, whole, strict=True)) / len(whole)
    record.figure(mean_nat=off)
    assert 0 < off < {"int8": 0.2, "int4": 1.5}[option], f"off by {off:.3g} nat on average"
