"""Where a process of vLLM's finds overrides: the environment and vLLM's config. Nothing heavy is
imported here: with nothing chosen this is all that runs.
"""

from __future__ import annotations

import os
import shlex
from typing import Any

from vllm_di.errors import ConfigError

VARIABLE = "DI_CONFIG"
KEY = "vllm_di"
"""In vLLM's ``additional_config``."""
Override = tuple[str, str]
"""(``attention=sdpa``, where it stands)."""


def from_environment() -> list[Override]:
    """The overrides in DI_CONFIG. Raises ConfigError."""
    text = os.environ.get(VARIABLE, "")
    try:
        return [(word, f"env {VARIABLE}") for word in shlex.split(text)]
    except ValueError as error:
        raise ConfigError(f"env {VARIABLE}: {text!r}: {error}") from None


def from_config(vllm_config: Any) -> list[Override]:
    """Those of ``--additional-config '{"vllm_di": [...]}'``; an entry may be [override, where it
    was read]. Raises ConfigError."""
    extra = getattr(vllm_config, "additional_config", None)
    entries = extra.get(KEY, []) if isinstance(extra, dict) else []
    where = f"--additional-config {KEY}"
    if isinstance(entries, str):
        raise ConfigError(f"{where}: expected a list of overrides, got {entries!r}")
    found: list[Override] = []
    for entry in entries:
        pair = entry if isinstance(entry, list | tuple) else (entry, where)
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ConfigError(
                f"{where}: expected an override such as attention=sdpa, got {entry!r}"
            )
        found.append((pair[0], pair[1]))
    return found


def overrides_of(vllm_config: Any = None) -> list[Override]:
    """All overrides that this process has; those of the config come after and win."""
    carried = from_config(vllm_config) if vllm_config is not None else []
    return [*(o for o in from_environment() if o not in carried), *carried]
