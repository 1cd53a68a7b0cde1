"""vllm-di: an LLM serving engine whose every hardware decision is a named slot.

``LLM`` and ``SamplingParams`` are loaded on first use, so that ``import vllm_di`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_di.version import __version__

if TYPE_CHECKING:
    from vllm_di.components.messages import SamplingParams
    from vllm_di.frontend.outputs import CompletionOutput, RequestOutput
    from vllm_di.llm import LLM

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "vllm_di.llm",
    "SamplingParams": "vllm_di.components.messages",
    "CompletionOutput": "vllm_di.frontend.outputs",
    "RequestOutput": "vllm_di.frontend.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vllm_di' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
