"""Every tensor of a checkpoint is used, and a tensor that does not fit is refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_di.components.quantized import QuantizedWeight, by_group
from vllm_di.conformance import tiny
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, ask, run
from vllm_di.conformance.op_cases import Maker
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.errors import CheckpointError

LEAST_COSINE = 0.99
"""Cosine of a quantised GEMM with the exact one: 4 bits in groups of 32 reach 0.999 with the
bias."""
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


COSTS = {"int8": 0.2, "int4": 1.5}
"""Nats that a token's log-prob may be off on average: a port's own quantization may lose as much as
4 bits do."""
SHAPES = ((64, 33), (96, 130), (32, 70_001))
"""(inputs, outputs) of the GEMMs."""


def quantized(subject: Subject, option: str) -> list[str]:
    """The overrides that choose a declared quantization. Raises NotDeclared for ``none``, which
    stands where nothing is declared."""
    if option not in subject.declared.quantization:
        raise NotDeclared("no quantization")
    return [f"{stage}quantization={option}" for stage in subject.stages]


def test_quantised_weights(subject: Subject, record: Record, declared_quantization: str) -> None:
    """Near the exact answers: off by what fewer bits cost, and no more. A quantization that wants
    weights as a quantised checkpoint holds them leaves plain weights as they are."""
    more = quantized(subject, declared_quantization)
    record.feature(f"quantization {declared_quantization}")
    with subject.parts("quantization", more=more) as container:
        keeps = container.quantization().takes_quantized
    folder = subject.model_folder("bias")
    whole = flat(score(subject, folder))[: len(PROMPTS[0]) - 1]
    found = flat(score(subject, folder, *more))[: len(PROMPTS[0]) - 1]
    off = sum(abs(a - b) for a, b in zip(found, whole, strict=True)) / len(whole)
    record.figure(mean_nat=off)
    assert keeps or off > 0, "it changes nothing"
    most = subject.slack if keeps else COSTS.get(declared_quantization, max(COSTS.values()))
    assert off < most, f"off by {off:.3g} nat on average, {most} may be"


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_quantised_products(
    subject: Subject, record: Record, declared_quantization: str, size: tuple[int, int]
) -> None:
    """What a quantization makes of a single weight, also of widths that no tiny model has."""
    more = quantized(subject, declared_quantization)
    inputs, outputs = size
    make = Maker(subject.dtype(subject.exact_dtype), subject.seed)
    dense = make.real(outputs, inputs) / inputs**0.5
    worst = 1.0
    with subject.parts("quantization", "device", more=more) as container, torch.inference_mode():
        quantization, device = container.quantization(), container.device().torch_device
        weights: list[Tensor | QuantizedWeight] = [dense]
        if quantization.takes_quantized:
            weights += [by_group(dense.float(), 4), by_group(dense.float(), 8)]
        for weight, rows in itertools.product(weights, (1, 3)):
            exact = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
            x, bias = make.real(rows, inputs), 3 * make.real(outputs)
            given = weight.clone().to(device) if isinstance(weight, Tensor) else weight
            run = quantization.linear(given, bias.to(device))
            found = run(x.to(device)).cpu().float()
            wanted = x.float() @ exact.float().T + bias.float()
            assert found.shape == wanted.shape, f"shape {tuple(found.shape)}"
            for a, b in ((found, wanted), (found[:, outputs // 2 :], wanted[:, outputs // 2 :])):
                worst = min(worst, float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)))
    record.figure(cosine=worst)
    assert worst >= LEAST_COSINE, f"cosine {worst:.4f} with the products of the whole weights"
