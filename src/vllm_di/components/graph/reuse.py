"""Which parts of a step prevent running it again without its Python."""

from __future__ import annotations

from vllm_di.components.interfaces import AttentionBackend, Model, Quantization, Reuse


def unable(how: Reuse, **parts: AttentionBackend | Quantization | Model) -> list[str]:
    """A reason for each part that does not declare ``how``; parts by slot."""
    done = {"record": "recorded", "capture": "captured", "compile": "compiled"}[how]
    return [f"{slot} cannot be {done}" for slot, part in parts.items() if how not in part.reuses]
