"""The key under which a program keeps what it compiled: the same in each process and on each day,
another where anything that it was compiled from is another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from vllm_di.components.interfaces import INTERFACE_VERSION, PlanShape
from vllm_di.components.program.traced import TracedStep


def compile_key(
    step: TracedStep,
    *,
    target: str,
    versions: Mapping[str, str],
    shapes: Iterable[PlanShape] = (),
    with_weights: bool,
) -> str:
    """SHA-256, in hex, of

    * the traced step: its ops in order with their arguments, which follow from the model's config,
      the op set, attention and the ranks; its inputs; names, sizes, dtypes and shares of weights;
    * the values of constants, and those of the weights where the program holds them
      (``with_weights``): then another checkpoint is another program;
    * ``shapes`` that it is compiled for, none where it takes any;
    * ``target``: what it is compiled for, as the compiler names it (the CPU's model and
      capabilities, a chip and its topology);
    * ``versions`` of the compiler and its libraries, torch's, and that of the interfaces.
    """
    digest = hashlib.sha256()
    facts = {
        "graph": str(step.graph.graph),
        "inputs": step.inputs,
        "unwritten": step.unwritten,
        "weights": {name: [asdict(p) for p in parts] for name, parts in step.weights.items()},
        "shapes": [asdict(shape) for shape in shapes],
        "target": target,
        "versions": {**versions, "torch": torch.__version__, "interfaces": INTERFACE_VERSION},
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(step.graph.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if with_weights or name not in step.weights:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
