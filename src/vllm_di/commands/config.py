"""``vllm-di config show``: the composed config as YAML, with the origin of each value on
request."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection
from typing import Any

from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.commands.say import warn
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import ConfigError

SECRETS = frozenset(
    ["api_key", "api_keys", "auth_token", "access_token", "hf_token", "password", "secret"]
)
"""Keys whose values are masked, wherever they stand. A key is declared a secret too by a comment
behind it that begins so: ``licence: null  # secret: the licence key``."""
SECRET_TEXT = re.compile(r"secret\b", re.IGNORECASE)
STAGE = re.compile(r"^stages\.\d+\.")
MASK = "********"


def run(arguments: Arguments) -> int:
    """The one sub-verb is ``show``."""
    if arguments.words != ["show"]:
        raise UsageError("write: vllm-di config show [overrides] [--origins]")
    from vllm_di.components.interfaces import DEFAULT_ROLE
    from vllm_di.containers.assembly import assemble

    assembly = assemble(arguments.overrides, arguments.config_dirs, incomplete=True)
    warn(assembly.warnings)
    nodes = {**assembly.server, **assembly.engine}
    for role, stages in assembly.workers.items():
        numbered = {str(stage): worker for stage, worker in enumerate(stages)}
        of_role = {"stages": numbered} if len(stages) > 1 else stages[0]
        nodes |= of_role if role == DEFAULT_ROLE else {role: of_role}
    declared = declared_secrets(ConfigFiles.find(arguments.config_dirs))
    for key, text, masked in lines({**assembly.settings, **nodes}, declared):
        origin = assembly.place(key) if "--origins" in arguments.switches and ":" in text else ""
        if masked and origin.startswith("command line"):
            origin = "command line"  # the override as typed holds the value
        print(f"{text}  # {origin}" if origin and not text.endswith(":") else text)
    return 0


def declared_secrets(tree: ConfigFiles) -> set[str]:
    """Dotted keys, such as ``server.licence``, that a comment in some option declares secret."""
    found = set()
    for group in tree.groups():
        for path in tree.options(group).values():
            with contextlib.suppress(ConfigError):  # another option's file is not asked for
                file = tree.read(path)
                prefix = "" if file.is_global else f"{group}."
                found |= {prefix + k for k, t in file.texts.items() if SECRET_TEXT.match(t)}
    return found


def lines(
    values: dict[str, Any], secrets: Collection[str], prefix: str = "", indent: int = 0
) -> list[tuple[str, str, bool]]:
    """(dotted key, line of YAML, whether its value is masked) for a nest of mappings."""
    found = []
    for name, value in values.items():
        key, margin = f"{prefix}{name}", "  " * indent
        secret = name in SECRETS or STAGE.sub("", key) in secrets
        shown = MASK if secret and value is not None else _masked(value)
        if isinstance(shown, dict) and shown:
            found.append((key, f"{margin}{name}:", False))
            found += lines(shown, secrets, f"{key}.", indent + 1)
        else:
            text = f"{margin}{name}: {json.dumps(shown, ensure_ascii=False)}"
            found.append((key, text, secret))
    return found


def _masked(value: Any) -> Any:
    """Secrets within lists masked too."""
    if isinstance(value, list):
        return [_masked(v) for v in value]
    if isinstance(value, dict):
        return {k: MASK if k in SECRETS and v is not None else _masked(v) for k, v in value.items()}
    return value
