"""Which form of tool calls a chat template shows."""

from __future__ import annotations

_SIGNS = (
    ("<function=", "qwen3_coder"),
    ("<start_function_call>", "gemma"),
    ("[TOOL_CALLS]", "mistral"),
    ("functools", "phi4"),
    ("<|/tool_call|>", "phi4"),
    ("<|/tool|>", "phi4"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
    ("[func_name1(", "pythonic"),
    ('{"name": function name, "parameters"', "llama3_json"),
)
"""Texts in the template of each family, the telling ones first."""
UNKNOWN = "hermes"


def family_of(template: str) -> tuple[str, str]:
    """-> an option of ``tool_parser``, and why."""
    for sign, family in _SIGNS:
        if sign in template:
            return family, f"it has {sign}"
    if "tools" in template:
        return UNKNOWN, "it writes tools, but shows no form of calls that is known"
    return UNKNOWN, "it says nothing of tools, so the model is told of none"
