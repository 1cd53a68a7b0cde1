"""vLLM's worker with the parts of the container: it opens this project's components before the
model is built, puts runner, sampler and layers in place, and compares what was built with what was
chosen.

vLLM resolves ``vllm_di.vllm.worker.BASE``, where BASE is the dotted name of the worker to extend
with ``/`` for dots.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

from vllm_di.errors import ConfigError
from vllm_di.vllm.assembled import Assembled, current
from vllm_di.vllm.errors import plain
from vllm_di.vllm.extending import base_of
from vllm_di.vllm.verify import held, verify


def __getattr__(name: str) -> Any:
    return worker_of(base_of(__name__, name))


@functools.cache
def worker_of(base: type) -> type:
    """``base`` with the parts of the container."""
    return type(base.__name__, (AssembledWorker, base), {"__module__": __name__, "extended": base})


class AssembledWorker:
    """In front of a worker of vLLM's."""

    vllm_config: Any
    model_runner: Any
    extended: type
    """The worker class behind it."""

    def __init__(self, vllm_config: Any, *arguments: Any, **more: Any) -> None:
        self._stack = ExitStack()
        with plain():
            self.assembled = current(vllm_config)
            register_layers(self.assembled)
            if self.assembled.choices.is_ours("quantization"):
                prepare_tiles()
        super().__init__(vllm_config, *arguments, **more)  # type: ignore[call-arg]

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        with plain():
            runner, sampler = self.assembled.get("model_runner"), self.assembled.get("sampler")
            if runner is not None:
                # the worker builds its own inline: no weight is loaded yet
                self.model_runner = runner(self.vllm_config, self.device)  # type: ignore[attr-defined]
            if sampler is not None:
                own = self.model_runner.sampler
                self.model_runner.sampler = build_sampler(sampler, own, self.vllm_config)

    def load_model(self, *arguments: Any, **more: Any) -> Any:
        with plain():
            self.assembled.open(self._stack, self.vllm_config)
        loaded = super().load_model(*arguments, **more)  # type: ignore[misc]
        with plain():
            verify(self.assembled, self)
        return loaded

    def shutdown(self) -> None:
        super().shutdown()  # type: ignore[misc]
        self._stack.close()

    def vllm_di_report(self) -> dict[str, Any]:
        """What this process holds in each slot, and how often the adapters were called:
        ``llm.collective_rpc("vllm_di_report")``."""
        return {"held": held(self), "calls": dict(self.assembled.calls)}


def build_sampler(sampler: type, own: Any, vllm_config: Any) -> Any:
    """With the arguments that vLLM's runner gives its own."""
    model = vllm_config.model_config
    arguments = {"logprobs_mode": model.logprobs_mode}
    if hasattr(model, "use_fp64_gumbel"):
        arguments["use_fp64_gumbel"] = model.use_fp64_gumbel
    return sampler(**arguments)


def register_layers(assembled: Assembled) -> None:
    """Tell vLLM which class stands for which of its layers. One class a name and process: raises
    ConfigError where somebody else came first."""
    from vllm.model_executor.custom_op import CustomOp, op_registry_oot

    from vllm_di.vllm.versions import layer_class

    for name, cls in (assembled.get("ops") or {}).items():
        before = op_registry_oot.get(name)
        if before is cls:
            continue
        if before is not None:
            raise ConfigError(
                f"{assembled.choices.where('ops')}: ops: {name} is replaced in this process "
                f"already, by {before.__module__}.{before.__qualname__}"
            )
        CustomOp.register_oot(name=name)(cls)
        cls.name = layer_class(name).name  # what vLLM's switches call it


def prepare_tiles() -> None:
    """vLLM's attention for CPUs uses AMX's tiles, which a process must ask the kernel for. It
    counts on oneDNN's first product to have done so; with products of this project's there is none,
    and it would die of SIGILL."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
