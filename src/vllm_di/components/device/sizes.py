"""Sizes as people write them: ``512MiB``, ``2GB``, ``1073741824``."""

from __future__ import annotations

import re

from vllm_di.errors import ConfigError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{prefix}i": 1024**power for power, prefix in enumerate("KMGT", 1)
}


def parse_size(text: str | int) -> int:
    """Bytes. Raises ConfigError for what is no size."""
    if isinstance(text, int):
        number, unit = float(text), ""
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
        if found is None:
            raise ConfigError(f"{text!r} is not a size; write 512MiB, 2GB or a number of bytes")
        number, unit = float(found[1]), (found[2] or "").capitalize()
    if number <= 0:
        raise ConfigError(f"{text!r}: a size must be above zero")
    return int(number * UNITS[unit])
