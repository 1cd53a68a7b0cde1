"""What the adapters rely on of vLLM's classes, as data: ``python -m tests.vllm.record FILE`` in an
environment with vLLM writes it. ``make test-vllm`` compares it with what is installed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

METHODS = {
    "hooks.py:Hooks": (
        "vllm.platforms.interface.Platform",
        ["check_and_update_config", "get_attn_backend_cls", "get_device_communicator_cls"],
    ),
    "worker.py:AssembledWorker": (
        "vllm.v1.worker.cpu_worker.CPUWorker",
        ["__init__", "init_device", "load_model", "shutdown"],
    ),
    "adapters/attention.py:Builder": (
        "vllm.v1.attention.backend.AttentionMetadataBuilder",
        ["__init__", "build"],
    ),
    "adapters/attention.py:Impl": (
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
        ["__init__", "forward"],
    ),
    "adapters/communicator.py:GroupCommunicator": (
        "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator",
        ["__init__", "all_reduce", "all_gather", "destroy"],
    ),
    "adapters/linear.py:LinearMethod": (
        "vllm.model_executor.layers.linear.UnquantizedLinearMethod",
        ["process_weights_after_loading", "apply"],
    ),
    "adapters/linear.py:HeadMethod": (
        "vllm.model_executor.layers.vocab_parallel_embedding.UnquantizedEmbeddingMethod",
        ["process_weights_after_loading", "apply"],
    ),
    "adapters/linear.py:Products": (
        "vllm.model_executor.layers.quantization.base_config.QuantizationConfig",
        ["get_name", "get_supported_act_dtypes", "get_quant_method", "from_config"],
    ),
    "adapters/layers.py:RMSNorm.run": (
        "vllm.model_executor.layers.layernorm.RMSNorm",
        ["forward_native"],
    ),
    "adapters/layers.py:SiluAndMul.run": (
        "vllm.model_executor.layers.activation.SiluAndMul",
        ["forward_native"],
    ),
    "adapters/layers.py:GeluAndMul.run": (
        "vllm.model_executor.layers.activation.GeluAndMul",
        ["forward_native"],
    ),
    "adapters/layers.py:RotaryEmbedding.run": (
        "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding",
        ["forward_native"],
    ),
}
"""File and class (and the one method that stands for all) to vLLM's class and its methods."""
RECORDS = Path(__file__).parent / "signatures"
FIELDS = "vllm.v1.attention.backend.CommonAttentionMetadata"


def record() -> dict[str, Any]:
    """[parameter, whether it has a default] of each method, and the fields of vLLM's batch."""
    methods: dict[str, Any] = {}
    for ours, (theirs, names) in METHODS.items():
        cls = _named(theirs)
        methods[ours] = {name: _parameters(cls, name) for name in names}
    return {
        "methods": methods,
        "fields": [f.name for f in dataclasses.fields(_named(FIELDS))],
    }


def _parameters(cls: type, name: str) -> list[list[Any]]:
    found = inspect.signature(getattr(cls, name)).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = [p for p in found if p.kind not in kinds and p.name not in ("self", "cls")]
    return [[p.name, p.default is not p.empty] for p in plain]


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(record(), indent=1) + "\n")
