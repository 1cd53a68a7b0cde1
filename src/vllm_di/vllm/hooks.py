"""vLLM's own platform for this machine, with the container's answers in its hooks.

``Platform``, which vLLM resolves, is made when it is asked for: a subclass of the class that vLLM
would have taken. Where nothing is chosen each hook calls that class, and nothing else.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from vllm_di.errors import ConfigError
from vllm_di.vllm import versions
from vllm_di.vllm.errors import plain
from vllm_di.vllm.extending import path_of
from vllm_di.vllm.sources import KEY, from_environment, overrides_of

if TYPE_CHECKING:
    from vllm_di.vllm.assembled import Assembled


def __getattr__(name: str) -> Any:
    if name != "Platform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with plain():
        return platform_of(own_platform())


def own_platform() -> type:
    """The platform class that is vLLM's own here, or that DI_CONFIG names. Raises ConfigError."""
    from vllm.platforms import builtin_platform_plugins as probes

    overrides = from_environment()
    if overrides:
        from vllm_di.vllm.choices import choose

        node = choose(overrides).nodes["platform"]
        paths = [node["_target_"]]
        if node["name"] in probes and probes[node["name"]]() is None:
            raise ConfigError(
                f"{choose(overrides).where('platform')}: platform={node['name']}: vLLM does not "
                "find this platform here"
            )
    else:
        paths = [path for probe in probes.values() if (path := probe()) is not None]
    if len(paths) != 1:
        found = ", ".join(paths) or "none"
        raise ConfigError(f"vLLM finds these platforms of its own here: {found}; expected one")
    module, _, name = paths[0].rpartition(".")
    found_class: type = getattr(importlib.import_module(module), name)
    return found_class


@functools.cache
def platform_of(base: type) -> type:
    """``base`` with the hooks."""
    return type(base.__name__, (Hooks, base), {"__module__": __name__, "__doc__": base.__doc__})


class Hooks:
    """What the container answers in vLLM's platform."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        with plain():
            assembled = chosen(vllm_config)
            if assembled is not None:
                versions.check()
                assembled.check()
                refuse_conflicts(assembled, vllm_config)
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if assembled is not None:
            with plain():
                install(assembled, vllm_config)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, *rest: Any, **more: Any
    ) -> str:
        with plain():
            assembled = chosen()
            backend = assembled.get("attention") if assembled is not None else None
            if assembled is not None and backend is not None:
                _check_attention(assembled, backend, attn_selector_config)
                return f"{backend.__module__}.{backend.__qualname__}"
        path: str = super().get_attn_backend_cls(  # type: ignore[misc]
            selected_backend, attn_selector_config, *rest, **more
        )
        return path

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        base: str = super().get_device_communicator_cls()  # type: ignore[misc]
        with plain():
            assembled = chosen()
            held = assembled.get("communicator") if assembled is not None else None
            if assembled is None or held is None:
                return base
            if assembled.choices.is_ours("communicator"):
                return path_of("vllm_di.vllm.adapters.communicator", base)
            return f"{held.__module__}.{held.__qualname__}"


def chosen(vllm_config: Any = None) -> Assembled | None:
    """The choices for a config, by default the one that vLLM builds with right now; None where
    nothing is chosen. Raises ConfigError."""
    config = vllm_config if vllm_config is not None else versions.current_config()
    if not overrides_of(config):
        return None
    from vllm_di.vllm.assembled import current

    found = current(config)
    return found if found.choices.chosen else None


def _check_attention(assembled: Assembled, backend: Any, config: Any) -> None:
    where = assembled.choices.where("attention")
    if config.use_mla or getattr(config, "use_sparse", False):
        kind = "latent (MLA)" if config.use_mla else "sparse"
        raise ConfigError(f"{where}: attention: {backend.__name__} is not for {kind} attention")
    if config.dtype not in backend.supported_dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in backend.supported_dtypes)
        raise ConfigError(
            f"{where}: attention: {backend.__name__} does not do {config.dtype}; it does {known}"
        )


def refuse_conflicts(assembled: Assembled, config: Any) -> None:
    """Raise ConfigError for a slot that a flag of vLLM's fills too, and for a choice that this
    engine would never call."""
    choices, parallel = assembled.choices, config.parallel_config
    scheduler, model = config.scheduler_config, config.model_config
    flags = {
        "worker": ("--worker-cls", parallel.worker_cls, ("auto",)),
        "attention": ("--attention-backend", config.attention_config.backend, (None,)),
        "scheduler": (
            "--scheduler-cls",
            scheduler.scheduler_cls,
            (None, _path(assembled, "scheduler")),
        ),
        "quantization": ("--quantization", model and model.quantization, (None, KEY)),
    }
    for slot, (flag, value, free) in flags.items():
        if slot == "worker" and str(value).startswith("vllm_di.vllm.worker."):
            continue
        if slot in choices.chosen and value not in free:
            raise ConfigError(
                f"{choices.where(slot)}: {slot} is chosen by {flag} {value} too; leave one out"
            )
    for layer in choices.layers:
        name = _registered(layer)
        if f"-{name}" in config.compilation_config.custom_ops:
            raise ConfigError(
                f"{choices.where('ops')}: {layer} is chosen, and vLLM's custom_ops switch it off "
                f"with -{name}; leave one out"
            )
    if "communicator" in choices.chosen and parallel.tensor_parallel_size < 2:
        raise ConfigError(
            f"{choices.where('communicator')}: communicator: a group of one rank never calls it; "
            "add --tensor-parallel-size 2"
        )


def install(assembled: Assembled, config: Any) -> None:
    """Put the choices where vLLM reads them. Doing it twice changes nothing."""
    choices, parallel = assembled.choices, config.parallel_config
    config.additional_config = {
        **(config.additional_config or {}),
        KEY: [list(override) for override in choices.overrides],
    }  # for the workers, and for the key of vLLM's compile cache
    if not str(parallel.worker_cls).startswith("vllm_di.vllm.worker."):
        base = _path(assembled, "worker") or parallel.worker_cls
        parallel.worker_cls = path_of("vllm_di.vllm.worker", base)
    if "scheduler" in choices.chosen:
        config.scheduler_config.scheduler_cls = _path(assembled, "scheduler")
    if "executor" in choices.chosen:
        parallel.distributed_executor_backend = assembled.get("executor")
    if "quantization" in choices.chosen:
        config.quant_config = assembled.get("quantization")()
    for op, providers in (assembled.get("ir_op_priority") or {}).items():
        _prioritise(assembled, config, op, providers)
    custom = config.compilation_config.custom_ops
    for layer in choices.layers:
        if (switch := f"+{_registered(layer)}") not in custom:
            custom.append(switch)


def _prioritise(assembled: Assembled, config: Any, op: str, providers: list[str]) -> None:
    from vllm.ir.op import IrOp
    from vllm.platforms import current_platform

    current_platform.import_ir_kernels()
    known = list(IrOp.registry[op].impls)
    for provider in providers:
        if provider not in known:
            key = f"ir_op_priority.{op}"
            raise ConfigError(
                f"{assembled.choices.place(key)}: {key}: vLLM has no provider {provider!r} of it; "
                f"there are {', '.join(known)}"
            )
    held = getattr(config.kernel_config.ir_op_priority, op)
    rest = [name for name in held if name not in providers]
    setattr(config.kernel_config.ir_op_priority, op, [*providers, *rest])


def _path(assembled: Assembled, slot: str) -> str | None:
    found = assembled.get(slot)
    return f"{found.__module__}.{found.__qualname__}" if found is not None else None


def _registered(layer: str) -> str:
    """vLLM's name of a layer in its switches, such as rms_norm."""
    return str(versions.layer_class(layer).name)
