"""Help from the comments in the YAML files: no component, no Hydra and no torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_di.commands.arguments import (
    ALIASES,
    OPTIONS,
    SWITCHES,
    VERB_OPTIONS,
    VERB_SWITCHES,
    VERBS,
    Arguments,
    UsageError,
)
from vllm_di.commands.table import print_table
from vllm_di.errors import nearest

if TYPE_CHECKING:
    from vllm_di.containers.tree import ConfigFiles


def run(arguments: Arguments) -> int:
    """All verbs and groups, or one group, or one option."""
    from vllm_di.containers.tree import ConfigFiles

    tree = ConfigFiles.find(arguments.config_dirs)
    asked = [*arguments.words, *arguments.overrides]
    for word in asked:
        group, _, option = word.partition("=")
        groups = tree.groups()
        if group not in groups:
            raise UsageError(f"no group {group!r}{nearest(group, groups)}")
        options = tree.options(group)
        if option and option not in options:
            raise UsageError(f"group {group!r} has no option {option!r}{nearest(option, options)}")
        for name in [option] if option else options:
            _option(tree, group, name, options[name])
    if not asked:
        _overview(tree, arguments.verb)
    return 0


def _overview(tree: ConfigFiles, verb: str) -> None:
    print("vllm-di VERB [group=option ...] [key.in.a.node=value ...] [--flags]\n")
    if verb and verb != "help":
        print(f"{verb}: {VERBS[verb]}\n")
        own = VERB_SWITCHES.get(verb, {}) | VERB_OPTIONS.get(verb, {})
        if own:
            print_table(["flag", "what it does"], [list(row) for row in own.items()])
            print()
    else:
        print_table(["verb", "what it does"], [list(row) for row in VERBS.items()])
        print()
    flags = [[name, text] for name, text in (SWITCHES | OPTIONS).items()]
    flags += [[name, f"short for {text}"] for name, (_, text) in ALIASES.items()]
    print_table(["flag", "what it does"], flags)
    print()
    rows = [[group, ", ".join(tree.options(group))] for group in tree.groups()]
    print_table(["group", "options"], rows)
    print("\nvllm-di help GROUP=OPTION lists the keys of an option.")


def _option(tree: ConfigFiles, group: str, name: str, path: Path) -> None:
    """One option: its summary, then its keys with default and text, shared ones too."""
    import yaml

    file = tree.read(path)
    print(f"{group}={name}: {file.summary}" if file.summary else f"{group}={name}")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    sources = [(file, values)]
    if "base" in str(values.get("defaults", "")):
        base = path.parent / "base.yaml"
        sources.append((tree.read(base), yaml.safe_load(base.read_text(encoding="utf-8"))))
    rows, seen = [], set()
    for source, content in sources:
        for key in source.lines:
            if key in seen or key.endswith("_target_") or key.split(".")[0] == "defaults":
                continue
            seen.add(key)
            value = content
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, dict):
                text = source.texts.get(key, "")
                prefix = "" if group == "platform" else f"{group}."
                rows.append([prefix + key, "null" if value is None else str(value), text])
    if rows:
        print_table(["key", "default", "what it is"], rows)
    print()
