"""What is tried inside vLLM. Each case runs in a process of its own, on a small random Llama in
fp32, for 20 prompts of 32 tokens each, and is held against stock vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SAMPLES = "vllm_di.vllm.conformance.samples"
ATTENTION = ("attention.build", "attention.forward")
LAYERS = ("rms_norm", "add_rms_norm", "silu_and_mul", "rotary_embedding")
PRODUCTS = ("linear", "head")
ALL = ("attention=paged", "ops=cpu", "quantization=none")
MIXED = ("attention=sdpa", "ops=cpu", "ops.rms_norm=torch")
OF_A_USERS = tuple(
    f"{slot}._target_={SAMPLES}.Counted{name}"
    for slot, name in (
        ("attention", "Attention"),
        ("model_runner", "Runner"),
        ("worker", "Worker"),
        ("scheduler", "Scheduler"),
        ("sampler", "Sampler"),
    )
)
COUNTED = ("attention", "model_runner", "worker", "scheduler", "sampler")
HELD = {
    "attention": "CountedAttention",
    "model_runner": "CountedRunner",
    "worker": "CountedWorker",
    "sampler": "CountedSampler",
}
COMPILED: Mapping[str, Any] = {"enforce_eager": False}


class Case(NamedTuple):
    """One engine of vLLM's."""

    name: str
    overrides: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    """Counters that must be above zero in every worker's process."""
    arguments: Mapping[str, Any] = {}
    """Of vLLM's LLM."""
    metrics: tuple[str, ...] = ()
    """Of vLLM's, which must be above zero: the case did what it is for."""
    held: Mapping[str, str] = {}
    """Slot to the end of the class's name that the worker must hold."""
    reference: str = "stock"
    """The case whose tokens must be the same; empty for one that rounds."""
    refused: tuple[str, ...] = ()
    """What the error says, for a case that must not start."""
    environment: Mapping[str, str] = {}


REFERENCES = (
    Case("stock", environment={"VLLM_PLUGINS": ""}, reference=""),
    Case(
        "stock-two-ranks",
        arguments={"tensor_parallel_size": 2},
        environment={"VLLM_PLUGINS": ""},
        reference="",
    ),
)
"""vLLM without this project's plugin, each in a fresh process."""

CASES = (
    Case("nothing-set"),
    Case("attention=sdpa", ("attention=sdpa",), ATTENTION),
    Case("attention=paged", ("attention=paged",), ATTENTION),
    Case("attention=hybrid", ("attention=hybrid",), ATTENTION),
    Case("ops=cpu", ("ops=cpu",), LAYERS),
    Case("ops=torch", ("ops=torch",), LAYERS),
    Case("one-op", ("ops.rms_norm=torch",), LAYERS[:2], held={"attention": "CPUAttentionBackend"}),
    Case("quantization=none", ("quantization=none",), PRODUCTS),
    Case("quantization=int8", ("quantization=int8",), PRODUCTS, reference=""),
    Case("quantization=int4", ("quantization=int4",), PRODUCTS, reference=""),
    Case("one-op-of-another-table", MIXED, (*ATTENTION, *LAYERS)),
    Case("all-of-ours", ALL, (*ATTENTION, *LAYERS, *PRODUCTS)),
    Case(
        "DI_CONFIG",
        calls=(*ATTENTION, *LAYERS[:2]),
        environment={"DI_CONFIG": "attention=sdpa ops.rms_norm=torch"},
    ),
    Case(
        "prefix-caching",
        ALL,
        ATTENTION,
        {"enable_prefix_caching": True},
        metrics=("vllm:prefix_cache_hits",),
    ),
    Case(
        "chunked-prefill",
        ALL,
        ATTENTION,
        {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_chunked_prefill": True},
    ),
    Case(
        "preemption",
        ALL,
        ATTENTION,
        {"num_gpu_blocks_override": 24, "enable_prefix_caching": False},
        metrics=("vllm:num_preemptions",),
    ),
    Case(
        "classes-of-a-users",
        OF_A_USERS,
        COUNTED,
        held=HELD,
    ),
    Case(
        "options-of-vLLMs-own",
        ("attention=vllm/cpu_attn", "scheduler=vllm/async", "ir_op_priority.rms_norm=native"),
        held={"attention": "CPUAttentionBackend", "ir_op_priority": "native"},
    ),
    Case(
        "two-ranks",
        ("communicator=shared_memory", *ALL),
        ("all_reduce", "all_gather", *ATTENTION, *LAYERS, *PRODUCTS),
        {"tensor_parallel_size": 2},
        reference="stock-two-ranks",
    ),
    Case(
        "compiled",
        ALL,
        (*ATTENTION, *LAYERS, *PRODUCTS),
        COMPILED,
    ),
    Case(
        "compiled-again",  # from vLLM's compile cache
        ALL,
        (*ATTENTION, *LAYERS, *PRODUCTS),
        COMPILED,
    ),
    Case("compiled-one-op", ("ops.rms_norm=torch",), LAYERS[:2], COMPILED),
    Case("compiled-attention", ("attention=paged",), ATTENTION, COMPILED),
    Case("compiled-products", ("quantization=none",), PRODUCTS, COMPILED),
    Case("compiled-int8", ("quantization=int8",), PRODUCTS, COMPILED, reference=""),
    Case("compiled-one-op-of-another-table", MIXED, (*ATTENTION, *LAYERS), COMPILED),
    Case("compiled-classes-of-a-users", OF_A_USERS, COUNTED, COMPILED, held=HELD),
    Case(
        "compiled-two-ranks",
        ("communicator=shared_memory", *ALL),
        ("all_reduce", "all_gather", *ATTENTION, *LAYERS, *PRODUCTS),
        {"tensor_parallel_size": 2, **COMPILED},
        reference="stock-two-ranks",
    ),
    Case(
        "a-wrong-name",
        ("attention=sdap",),
        refused=("VllmSlotError: --additional-config vllm_di", "did you mean 'sdpa'?"),
    ),
    Case(
        "a-class-of-another-interface",
        ("attention._target_=vllm.v1.core.sched.scheduler.Scheduler",),
        refused=("VllmSlotError: ", "does not extend vLLM's", "AttentionBackend"),
    ),
    Case(
        "a-class-that-is-not-trusted",
        ("worker._target_=json.JSONDecoder",),
        refused=("VllmSlotError: ", "trust="),
    ),
    Case(
        "a-flag-of-vLLMs-beside",
        ("attention=sdpa",),
        arguments={"attention_config": {"backend": "CPU_ATTN"}},
        refused=("VllmSlotError: ", "attention is chosen by --attention-backend", "leave one out"),
    ),
    Case(
        "an-op-that-vLLMs-switch-turns-off",
        ("ops.rms_norm=torch",),
        arguments={"compilation_config": {"custom_ops": ["all", "-rms_norm"], "mode": 0}},
        refused=("VllmSlotError: ", "-rms_norm", "leave one out"),
    ),
    Case(
        "a-layer-that-the-model-has-not",
        ("ops.gelu_tanh_and_mul=torch",),
        refused=("VllmSlotError: ", "no layer of this model is a GeluAndMul"),
    ),
    Case(
        "a-communicator-that-nobody-calls",
        ("communicator=shared_memory",),
        refused=("VllmSlotError: ", "add --tensor-parallel-size 2"),
    ),
    Case(
        "a-provider-that-is-none",
        ("ir_op_priority.rms_norm=cuda_c",),
        refused=("VllmSlotError: ", "no provider 'cuda_c'", "native"),
    ),
)
