"""Whether this project's platform class stands in for vLLM's own."""

from __future__ import annotations

import os
from importlib import metadata

from vllm_di.vllm.sources import VARIABLE

GROUP = "vllm.platform_plugins"
NAME = "vllm_di"


def rivals() -> list[str]:
    """Other platform plugins that vLLM will load: it refuses to run with two."""
    allowed = os.environ.get("VLLM_PLUGINS")
    names = None if allowed is None else allowed.split(",")
    found = {entry.name for entry in metadata.entry_points(group=GROUP)} - {NAME}
    return sorted(name for name in found if names is None or name in names)


def active() -> bool:
    """With nothing set another platform's plugin goes first; with DI_CONFIG set vLLM names both and
    refuses, which is better than a choice that nobody sees."""
    return bool(os.environ.get(VARIABLE)) or not rivals()
