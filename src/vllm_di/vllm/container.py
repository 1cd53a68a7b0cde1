"""The slots of vLLM, as a container of dependency-injector's. A slot holds a class, which vLLM
builds itself, or None: vLLM's own choice. ``ops`` and ``ir_op_priority`` hold a mapping."""

from __future__ import annotations

from typing import Any, NamedTuple

from dependency_injector.containers import DeclarativeContainer
from dependency_injector.providers import Dependency


class VllmContainer(DeclarativeContainer):
    """One for each process of vLLM; ``Assembled`` fills it."""

    platform: Dependency[Any] = Dependency()
    worker: Dependency[Any] = Dependency()
    model_runner: Dependency[Any] = Dependency()
    sampler: Dependency[Any] = Dependency()
    attention: Dependency[Any] = Dependency()
    communicator: Dependency[Any] = Dependency()
    scheduler: Dependency[Any] = Dependency()
    executor: Dependency[Any] = Dependency()
    quantization: Dependency[Any] = Dependency()
    ops: Dependency[Any] = Dependency()
    ir_op_priority: Dependency[Any] = Dependency()


class Slot(NamedTuple):
    """What is fixed about a slot."""

    interface: str
    """Dotted name of the class of vLLM's that a class must extend."""
    hook: str
    """Of vLLM's, which carries the choice."""
    flag: str = ""
    """Of vLLM's command line, which chooses the same."""


SLOTS: dict[str, Slot] = {
    "platform": Slot(
        "vllm.platforms.interface.Platform", "entry point vllm.platform_plugins: a subclass"
    ),
    "worker": Slot(
        "vllm.v1.worker.worker_base.WorkerBase",
        "check_and_update_config: parallel_config.worker_cls",
        "--worker-cls",
    ),
    "model_runner": Slot(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        "the worker's init_device or _make_model_runner",
    ),
    "sampler": Slot("vllm.v1.sample.sampler.Sampler", "the worker's init_device: runner.sampler"),
    "attention": Slot(
        "vllm.v1.attention.backend.AttentionBackend",
        "Platform.get_attn_backend_cls",
        "--attention-backend",
    ),
    "communicator": Slot(
        "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase",
        "Platform.get_device_communicator_cls",
    ),
    "scheduler": Slot(
        "vllm.v1.core.sched.interface.SchedulerInterface",
        "check_and_update_config: scheduler_config.scheduler_cls",
        "--scheduler-cls",
    ),
    "executor": Slot(
        "vllm.v1.executor.abstract.Executor",
        "check_and_update_config: parallel_config.distributed_executor_backend",
        "--distributed-executor-backend",
    ),
    "quantization": Slot(
        "vllm.model_executor.layers.quantization.base_config.QuantizationConfig",
        "check_and_update_config: quant_config",
        "--quantization",
    ),
    "ops": Slot("vllm.model_executor.custom_op.CustomOp", "CustomOp.register_oot in the worker"),
    "ir_op_priority": Slot(
        "", "check_and_update_config: kernel_config.ir_op_priority", "--ir-op-priority"
    ),
}

SHUT: dict[str, str] = {
    "engine": "vLLM builds its engine core itself",
    "kv_cache_manager": "vLLM's scheduler builds its KV-cache manager itself; scheduler._target_ "
    "names a whole scheduler",
    "kv_layout": "vLLM's blocks have one layout; the attention's adapter reads it as hnd",
    "kv_transfer": "vLLM's flag --kv-transfer-config chooses among its own",
    "tracing": "vLLM traces its requests itself, with --otlp-traces-endpoint",
    "router": "vLLM shares requests out over the engines of --data-parallel-size itself",
    "pooler": "vLLM's flag --pooler-config does",
    "structured_output": "vLLM's flag --structured-outputs-config chooses among its own",
    "drafter": "vLLM's flag --speculative-config chooses among its own",
    "device": "vLLM's platform owns the device",
    "graph": "vLLM's flag --compilation-config decides on graphs",
    "program": "vLLM's flag --compilation-config decides on compilation",
    "shapes": "vLLM's flag --compilation-config decides on sizes",
    "limits": "vLLM's flags --max-num-seqs and --max-num-batched-tokens do",
    "loader": "vLLM's flag --load-format chooses among its own",
    "model": "vLLM's model is its argument",
    "tokenizer": "vLLM's flag --tokenizer does",
    "chat_template": "vLLM's flag --chat-template does",
    "tool_parser": "vLLM's flag --tool-call-parser does",
    "reasoning_parser": "vLLM's flag --reasoning-parser does",
    "metrics": "vLLM's entry points vllm.stat_logger_plugins do",
    "server": "vLLM's own server answers",
}
"""Slots of this project's engine that vLLM offers no hook for, and what there is instead."""

ADAPTED = ("attention", "communicator", "quantization")
"""Slots for which an option of this project's is a choice, through an adapter. ``ops`` is a fourth,
whose adapters are layers."""

LAYERS: dict[str, tuple[str, ...]] = {
    "RMSNorm": ("rms_norm", "add_rms_norm"),
    "SiluAndMul": ("silu_and_mul",),
    "GeluAndMul": ("gelu_tanh_and_mul",),
    "RotaryEmbedding": ("rotary_embedding",),
}
"""vLLM's layer to the ops of this project that its adapter calls."""

CALLED_BY: dict[str, str] = {
    "linear": "quantization",
    "quantized_linear": "quantization",
    "write_kv": "attention",
    "paged_attention": "attention",
}
"""Op to the slot whose adapter calls it, for ops that belong to no layer above."""
