"""Which parts of a step stand in the way of running it again without its Python."""

from __future__ import annotations

from vllm_di.components.interfaces import AttentionBackend, Model, Quantization, Reuse


def unable(how: Reuse, **parts: AttentionBackend | Quantization | Model) -> list[str]:
    """Of parts by slot, a reason for each that does not declare ``how``."""
    done = {"record": "recorded", "capture": "captured", "compile": "compiled"}[how]
    return [f"{slot} cannot be {done}" for slot, part in parts.items() if how not in part.reuses]
