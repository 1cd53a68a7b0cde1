"""Which marks of reasoning a chat template shows."""

from __future__ import annotations

_SIGNS = (
    ("<\uff5cAssistant\uff5c>", "deepseek_r1"),
    ("thought process", "granite"),
    ("<think>", "qwen3"),
    ("</think>", "qwen3"),
)
"""Texts in the template of each family, the telling ones first."""


def family_of(template: str) -> tuple[str, str]:
    """-> an option of ``reasoning_parser``, and why. DeepSeek's models that do not think have its
    bars, and not its marks."""
    for sign, family in _SIGNS:
        if sign in template and (family != "deepseek_r1" or "think>" in template):
            return family, f"it has {sign}"
    return "none", "it has no marks of reasoning"
