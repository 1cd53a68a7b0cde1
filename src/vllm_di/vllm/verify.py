"""What a worker really holds, beside what was chosen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_di.errors import ConfigError
from vllm_di.vllm.container import LAYERS

if TYPE_CHECKING:
    from vllm_di.vllm.assembled import Assembled

log = logging.getLogger("vllm.vllm_di")  # below vLLM's own, so that its handlers print it


def held(worker: Any) -> dict[str, list[str]]:
    """Slot to the dotted names of the classes in this process, as they were built."""
    found = {
        slot: sorted({_name(o) for o in objects}) for slot, objects in _objects(worker).items()
    }
    found["attention"] = sorted({_name_of(layer.attn_backend) for layer in _attention(worker)})
    found["worker"] = [_name_of(getattr(worker, "extended", type(worker)))]
    return found


def verify(assembled: Assembled, worker: Any) -> None:
    """Raise ConfigError for a choice that the model was built without. A layer that stays with vLLM
    beside chosen ones is said in a line."""
    choices, objects = assembled.choices, _objects(worker)
    for slot in ("model_runner", "sampler", "communicator"):
        cls = assembled.get(slot)
        if cls is None:
            continue
        wrong = [o for o in objects[slot] if not isinstance(o, cls)]
        if wrong or not objects[slot]:
            _refuse(assembled, slot, cls, {_name(o) for o in wrong})
    backend = assembled.get("attention")
    if backend is not None:
        built = [layer.attn_backend for layer in _attention(worker)]
        if not built or any(cls is not backend for cls in built):
            _refuse(assembled, "attention", backend, {_name_of(cls) for cls in built})
    quantization = assembled.get("quantization")
    if quantization is not None and not isinstance(worker.vllm_config.quant_config, quantization):
        _refuse(assembled, "quantization", quantization, {_name(worker.vllm_config.quant_config)})
    if choices.layers:
        _verify_layers(assembled, worker)


def _verify_layers(assembled: Assembled, worker: Any) -> None:
    from vllm.model_executor.custom_op import CustomOp

    choices = assembled.choices
    table: dict[str, type] = assembled.get("ops")
    layers = [m for m in worker.model_runner.get_model().modules() if isinstance(m, CustomOp)]
    kinds = {type(layer) for layer in layers}
    where = choices.where("ops")
    for name, cls in table.items():
        if cls in kinds:
            continue
        text = f"{where}: ops: no layer of this model is a {name}; its layers of this kind are "
        names = sorted({_name(layer).rpartition(".")[2] for layer in layers})
        text += ", ".join(names) or "none"
        if len(table) < len(LAYERS):  # chosen by name, not all at once
            raise ConfigError(text)
        log.info("%s", text)
    disabled = worker.vllm_config.compilation_config.disabled_custom_ops
    for name, cls in table.items():
        if disabled[getattr(cls, "name")]:  # noqa: B009 - vLLM sets it on its classes
            raise ConfigError(f"{where}: ops: vLLM's custom_ops switch {name} off")


def _refuse(assembled: Assembled, slot: str, cls: type, built: set[str]) -> None:
    raise ConfigError(
        f"{assembled.choices.where(slot)}: {slot}: {_name_of(cls)} was chosen, but vLLM built "
        f"{', '.join(sorted(built)) or 'none'}"
    )


def _objects(worker: Any) -> dict[str, list[Any]]:
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.linear import LinearBase

    modules = list(worker.model_runner.get_model().modules())
    return {
        "model_runner": [worker.model_runner],
        "sampler": [worker.model_runner.sampler],
        "communicator": [c for c in [get_tp_group().device_communicator] if c is not None],
        "ops": [m for m in modules if isinstance(m, CustomOp)],
        "quantization": [m.quant_method for m in modules if isinstance(m, LinearBase)],
    }


def _attention(worker: Any) -> list[Any]:
    context = worker.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if hasattr(layer, "attn_backend")]


def _name(held_object: Any) -> str:
    return _name_of(type(held_object))


def _name_of(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
