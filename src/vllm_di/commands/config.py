"""``vllm-di config show``: the composed config as YAML, with the origin of each value on
request."""

from __future__ import annotations

import re
from typing import Any

from vllm_di.commands.arguments import Arguments, UsageError

SECRET = re.compile(r"(^|_)(key|token|password|secret)s?$", re.IGNORECASE)
"""Keys whose values are masked. Names of files and of environment variables are no secrets."""
MASK = "********"


def run(arguments: Arguments) -> int:
    """The one sub-verb is ``show``."""
    if arguments.words != ["show"]:
        raise UsageError("write: vllm-di config show [overrides] [--origins]")
    from vllm_di.containers.assembly import assemble

    assembly = assemble(arguments.overrides, arguments.config_dirs)
    workers = assembly.workers
    nodes = {**assembly.server, **assembly.engine}
    if len(workers) == 1:
        nodes |= workers[0]
    else:
        nodes["stages"] = {str(stage): worker for stage, worker in enumerate(workers)}
    for line in lines({**assembly.settings, **nodes}):
        key, text = line
        origin = assembly.place(key) if "--origins" in arguments.switches and ":" in text else ""
        print(f"{text}  # {origin}" if origin and not text.endswith(":") else text)
    return 0


def lines(values: dict[str, Any], prefix: str = "", indent: int = 0) -> list[tuple[str, str]]:
    """(dotted key, line of YAML) for a nest of mappings."""
    import json

    found = []
    for name, value in values.items():
        key, margin = f"{prefix}{name}", "  " * indent
        if SECRET.search(name) and value is not None and not isinstance(value, dict):
            value = MASK
        if isinstance(value, dict) and value:
            found.append((key, f"{margin}{name}:"))
            found += lines(value, f"{key}.", indent + 1)
        else:
            found.append((key, f"{margin}{name}: {json.dumps(value, ensure_ascii=False)}"))
    return found
