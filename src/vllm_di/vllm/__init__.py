"""The same slots inside vLLM: ``attention=sdpa`` for ``vllm serve``. See docs/vllm.md.

from vllm_di.vllm import LLM

llm = LLM("org/model", ["attention=sdpa", "ops.rms_norm=torch"], enforce_eager=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def platform() -> str | None:
    """Entry point of the group ``vllm.platform_plugins``: the platform's class, or None where it is
    left to another plugin. vLLM hides what is raised here, so that errors come with the class."""
    from vllm_di.vllm.entry import active

    return "vllm_di.vllm.hooks.Platform" if active() else None


def LLM(model: str, overrides: Sequence[str] = (), **arguments: Any) -> Any:
    """vLLM's ``LLM`` with choices for its slots; other arguments are vLLM's. Raises VllmSlotError
    for a wrong choice, before vLLM is imported."""
    from vllm_di.vllm.errors import plain
    from vllm_di.vllm.launch import prepare

    with plain():
        extra = prepare([(text, "LLM(overrides)") for text in overrides])
    if extra:
        given = dict(arguments.get("additional_config") or {})
        arguments["additional_config"] = given | {"vllm_di": [*given.get("vllm_di", []), *extra]}
    import vllm

    return vllm.LLM(model, **arguments)
