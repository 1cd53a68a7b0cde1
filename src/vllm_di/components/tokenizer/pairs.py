"""How a pair of texts is cut that is too long."""

from __future__ import annotations

from vllm_di.errors import RequestError


def longest_first(one: int, other: int, room: int) -> tuple[int, int]:
    """What is left of texts of ``one`` and ``other`` tokens that share ``room``: the longer one is
    cut until both are alike, then both are (``longest_first`` of the tokenizers library). Raises
    RequestError where there is no room."""
    if room < 1:
        raise RequestError(
            "truncate_prompt_tokens leaves no room between the special tokens of a pair",
            param="truncate_prompt_tokens",
        )
    if one + other <= room:
        return one, other
    shorter = min(one, other, room // 2)
    return (shorter, room - shorter) if one <= other else (room - shorter, shorter)
