"""Sizes as people write them: ``512MiB``, ``2GB``, ``1073741824``."""

from __future__ import annotations

import re
from fractions import Fraction

from vllm_di.errors import ConfigError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{prefix}i": 1024**power for power, prefix in enumerate("KMGT", 1)
}
LARGEST = 2**60
"""An exbibyte: what is above is a slip of the pen."""


def parse_size(text: str | int, key: str = "size") -> int:
    """Bytes. Raises ConfigError that names ``key`` for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]i?)?B?)\s*", str(text), re.IGNORECASE)
    if found is None:
        raise ConfigError(
            f"{key}: {text!r} is not a size; write 512MiB, 2GB or a number of bytes above zero"
        )
    size = int(Fraction(found[1]) * UNITS[(found[2] or "").capitalize()])
    if not 1 <= size <= LARGEST:
        raise ConfigError(f"{key}: {text!r}: a size must be from 1 to {LARGEST} bytes")
    return size


def show_size(size: int) -> str:
    """Bytes in the unit that people would take: ``1.50 GiB``."""
    for prefix, power in (("T", 4), ("G", 3), ("M", 2), ("K", 1)):
        if size >= 1024**power:
            return f"{size / 1024**power:.2f} {prefix}iB"
    return f"{size} B"
