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
    WITHOUT_OVERRIDES,
    WORDS,
    Arguments,
    UsageError,
)
from vllm_di.commands.say import warn
from vllm_di.commands.table import print_table
from vllm_di.containers.overrides import read
from vllm_di.errors import ConfigError, nearest

if TYPE_CHECKING:
    from vllm_di.containers.tree import ConfigFiles


def run(arguments: Arguments) -> int:
    """All verbs and groups, or one group, or one option."""
    from vllm_di.containers.tree import ConfigFiles

    tree = ConfigFiles.find(arguments.config_dirs)
    warn(tree.warnings())
    asked = [*arguments.words, *arguments.overrides]
    if arguments.verb not in ("", "help"):  # a verb's own words, such as a prompt, are no groups
        asked = [word for word in asked if read(word).key in tree.groups()]
    for word in asked:
        group, option = read(word).key, read(word).value
        groups = tree.groups()
        if group not in groups:
            raise UsageError(f"no group {group!r}{nearest(group, groups)}")
        options = tree.options(group)
        if option and option not in options:
            raise UsageError(f"group {group!r} has no option {option!r}{nearest(option, options)}")
        if option:
            tree.refuse_clash(group, option)
            _option(tree, group, option, options[option])
            continue
        for name, path in options.items():
            try:
                _option(tree, group, name, path)
            except ConfigError as error:
                if tree.port_of(path) is None:
                    raise
                print(f"{group}={name}: {error}\n")
    if not asked:
        _overview(tree, arguments.verb)
    return 0


def _overview(tree: ConfigFiles, verb: str) -> None:
    composes = verb not in WITHOUT_OVERRIDES
    if verb and verb != "help":
        usage = f"vllm-di {verb}{f' {WORDS[verb]}' if verb in WORDS else ''}"
        overrides = " [group=option ...] [key.in.a.node=value ...]" if composes else ""
        print(f"{usage}{overrides} [--flags]\n\n{VERBS[verb]}\n")
        own = VERB_SWITCHES.get(verb, {}) | VERB_OPTIONS.get(verb, {})
        if own:
            print_table(["flag", "what it does"], [list(row) for row in own.items()])
            print()
    else:
        print("vllm-di VERB [group=option ...] [key.in.a.node=value ...] [--flags]\n")
        print_table(["verb", "what it does"], [list(row) for row in VERBS.items()])
        print()
    flags = [[name, text] for name, text in (SWITCHES | OPTIONS).items()]
    if composes:
        flags += [[name, f"short for {text}"] for name, (_, text) in ALIASES.items()]
    print_table(["flag", "what it does"], flags)
    if not composes:
        return
    print()
    rows = [[group, ", ".join(tree.options(group))] for group in tree.groups()]
    print_table(["group", "options"], rows)
    print("\nvllm-di help GROUP=OPTION lists the keys of an option.")


def _option(tree: ConfigFiles, group: str, name: str, path: Path) -> None:
    """One option: its summary, then its keys with default and text, shared ones too."""
    summary = tree.read(path).summary
    print(f"{group}={name}: {summary}" if summary else f"{group}={name}")
    prefix = "" if group == "platform" else f"{group}."
    rows = [
        [prefix + key.name, "null" if key.default is None else str(key.default), key.text]
        for key in tree.keys(path)
    ]
    if rows:
        print_table(["key", "default", "what it is"], rows)
    print()
