"""In a process of its own: does importing a port's classes change anything outside it?

Reads the dotted names of classes as JSON on standard input, prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from vllm_di.components import interfaces, messages
from vllm_di.containers import assembly, fill, schema, slots

CORE = (interfaces, messages, assembly, slots, fill, schema, torch, torch.nn.functional)
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.bind")


def main() -> None:
    targets = json.load(sys.stdin)
    calls: list[str] = []
    sys.addaudithook(lambda event, _: calls.append(event) if event in NETWORK else None)
    before, watched = state(), _watched()
    attributes = {name: _attributes(module) for name, module in watched.items()}
    begin = time.process_time()
    for target in targets:
        importlib.import_module(target.rpartition(".")[0])
    seconds = time.process_time() - begin
    after = state()
    changed = [
        f"{key}: {before[key]} became {after[key]}" for key in before if before[key] != after[key]
    ]
    for name, module in watched.items():
        changed += [f"{name}.{key}" for key in _differences(attributes[name], _attributes(module))]
    json.dump({"seconds": seconds, "changed": changed, "network": calls}, sys.stdout)


def state() -> dict[str, Any]:
    """What the whole process shares."""
    found = {
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's default device": str(torch.get_default_device()),
        "torch's threads": torch.get_num_threads(),
        "torch's random state": hash(torch.get_rng_state().numpy().tobytes()),
        "torch's gradient mode": torch.is_grad_enabled(),
        "python's random state": hash(random.getstate()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "environment": hash(tuple(sorted(os.environ.items()))),
        "working directory": os.getcwd(),
    }
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and hasattr(module, "is_initialized"):
            found[f"{name} initialised"] = module.is_initialized()
    return found


def _watched() -> dict[str, ModuleType]:
    """Modules of the engine that are there before any port's."""
    named = {module.__name__: module for module in CORE}
    ours = {n: m for n, m in sys.modules.items() if n.startswith("vllm_di.") and m is not None}
    return ours | named


def _attributes(module: ModuleType) -> dict[str, int]:
    """Name to identity, of a module's values and of the members of its own classes; submodules
    come and go."""
    found: dict[str, int] = {}
    for name, value in list(vars(module).items()):
        if isinstance(value, ModuleType) or name.startswith("__"):
            continue
        found[name] = id(value)
        if isinstance(value, type) and value.__module__ == module.__name__:
            members = ((k, v) for k, v in list(vars(value).items()) if not k.startswith("_abc"))
            found |= {f"{name}.{k}": id(v) for k, v in members if not k.startswith("__")}
    return found


def _differences(before: dict[str, int], after: dict[str, int]) -> Iterable[str]:
    """Names that were set anew or removed; new names of torch are its own business."""
    return [name for name, value in before.items() if after.get(name) != value]


if __name__ == "__main__":
    main()
