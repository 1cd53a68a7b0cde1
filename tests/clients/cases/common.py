"""What the cases ask: answers that are certain whatever a model has learnt."""

from __future__ import annotations

from typing import Any

MODEL, POOLED = "smollm2", "tiny"
QUESTION = [{"role": "user", "content": "Invent a pet."}]
PET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 20},
    },
    "required": ["kind", "age"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "keep", "description": "Keeps a pet.", "parameters": PET},
}


def is_pet(value: Any) -> bool:
    return set(value) == {"kind", "age"} and value["kind"] in ("cat", "dog") and value["age"] <= 20


def is_unit(vector: list[float]) -> bool:
    """Whether it has the size and the length of the model's."""
    return len(vector) == 64 and abs(sum(x * x for x in vector) - 1) < 1e-4
