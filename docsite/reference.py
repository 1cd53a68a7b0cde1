"""The pages of reference: one for each config group, from the YAML files and the constructors, and
one for the command line.

The pages are made at each build and not kept: they could only fall behind what they are made from.
``python -m docsite.reference FOLDER`` writes them for a look.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from docsite.types import described, field_texts, first_paragraph, value
from vllm_di.commands.arguments import (
    ALIASES,
    OPTIONS,
    SWITCHES,
    VERB_OPTIONS,
    VERB_SWITCHES,
    VERBS,
    WITHOUT_OVERRIDES,
    WORDS,
)
from vllm_di.components.interfaces import OpLibrary, OpTable
from vllm_di.containers import replicas
from vllm_di.containers.manifest import Capabilities, CompileTargets, Detect, Manifest, RayNeeds
from vllm_di.containers.ports import conf_of_project
from vllm_di.containers.schema import find_class
from vllm_di.containers.signatures import Parameter, keys_of
from vllm_di.containers.slots import (
    SLOTS,
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)
from vllm_di.containers.tree import ConfigFiles, Key, shown

PROCESSES = {
    "API process": ServerContainer,
    "Engine process": EngineContainer,
    "Worker, one for each rank": WorkerContainer,
}
FOLDER = "reference"
MANIFEST: dict[str, type[msgspec.Struct]] = {
    "platform": Manifest,
    "platform.detect": Detect,
    "platform.capabilities": Capabilities,
    "platform.compile": CompileTargets,
    "platform.ray": RayNeeds,
}


TAKEN: dict[str, Any] = {
    replicas.PATH: replicas.Count,
    "model.architectures": list[str] | None,
}
"""Keys that the assembly reads itself, so that no constructor names them."""


def pages(tree: ConfigFiles | None = None) -> dict[str, str]:
    """Path below ``docs/`` to Markdown, of every page."""
    tree = tree or ConfigFiles([conf_of_project()])
    found = {f"{FOLDER}/index.md": index(tree), f"{FOLDER}/commands.md": commands()}
    return found | {f"{FOLDER}/{group}.md": group_page(tree, group) for group in tree.groups()}


def sections(tree: ConfigFiles) -> dict[str, list[str]]:
    """Title to groups, in the order of the navigation."""
    found = {title: list(slots(container)) for title, container in PROCESSES.items()}
    found["Worker, one for each rank"].remove("model")
    return {"What to run": ["platform", "model"], **found}


def index(tree: ConfigFiles) -> str:
    """Which option fills each slot, and the keys that belong to none."""
    root = tree.roots[0] / "config.yaml"
    file = tree.read(root)
    chosen = {group: option for group, (option, _) in file.chooses.items()}
    parts = [
        "# Groups, options and keys",
        "Made from the YAML files in `conf/` and from the constructors of the classes that they "
        "name. [Configuration](../configuration.md) says how to choose and to set; "
        "`vllm-di help GROUP=OPTION` prints the same in a terminal, with what installed ports add.",
    ]
    for title, groups in sections(tree).items():
        rows = [
            [
                f"[`{group}`]({group}.md)",
                f"`{chosen[group]}`",
                _interface(group)[1] if group in SLOTS else _GROUPS[group],
            ]
            for group in groups
        ]
        parts += [f"## {title}", _table(["group", "default", "what it is"], rows)]
    keys = [key for key in tree.keys(root) if key.name.split(".")[0] not in tree.groups()]
    rows = [[f"`{key.name}`", f"`{value(key.default)}`", _cell(key.text)] for key in keys]
    parts += [
        "## Keys of no group",
        _table(["key", "default", "what it is"], rows),
        "The [command line](commands.md) has the verbs and their flags.",
    ]
    return "\n\n".join(parts) + "\n"


_GROUPS = {"platform": "An option for each slot that the hardware decides, and a manifest."}


def group_page(tree: ConfigFiles, group: str) -> str:
    """Every option of a group: its class, its keys, and for a platform its manifest."""
    parts = [f"# {group}"]
    if group in SLOTS:
        name, text = _interface(group)
        parts.append(f"{text} Interface: `{name}`.")
    if group == "platform":
        parts += [_GROUPS["platform"], *_manifest_fields()]
    base = tree.included(group).get("base")
    options = tree.options(group)
    listed = ", ".join(f"[`{option}`](#{_anchor(group, option)})" for option in options)
    parts.append(f"Options: {listed}.")
    if base is not None:
        parts += [
            f"## Shared keys {{ #{_anchor(group, 'base')} }}",
            _cell(tree.read(base).summary),
            _keys(tree, group, base),
        ]
    for option, path in options.items():
        parts.append(f"## {group}={option} {{ #{_anchor(group, option)} }}")
        parts += (
            _platform(tree, option, path) if group == "platform" else _option(tree, group, path)
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _interface(slot: str) -> tuple[str, str]:
    """Name and first paragraph."""
    kind = SLOTS[slot]
    return kind.__name__, _cell(first_paragraph(kind))


def _option(tree: ConfigFiles, group: str, path: Path) -> list[str]:
    file, whole = tree.read(path), _whole(tree, path)
    parts = [_cell(file.summary)]
    target = whole.get("_target_", "auto")
    if target == "auto":
        parts.append("Stands for another option of the group, found at the start.")
    else:
        text = _cell(first_paragraph(find_class(target, ["vllm_di"], shown(path), group)))
        parts.append(f"`{target}`" + (f": {text}" if text else ""))
    inner = [
        f"`{group}.{name}`: `{node['_target_']}`" for name, node in _nodes(whole) if name != ""
    ]
    parts += [f"Within it {', '.join(inner)}."] if inner else []
    for included in file.includes:
        parts.append(f"Builds on [`{included}`](#{_anchor(group, included)}), with its keys.")
    chooses = [f"[`{g}={o}`]({g}.md#{_anchor(g, o)})" for g, o in _chosen(tree, path)]
    parts += [f"Chooses {', '.join(chooses)}."] if chooses else []
    return [*parts, _keys(tree, group, path)]


def _keys(tree: ConfigFiles, group: str, path: Path) -> str:
    """The keys that a file itself sets, and those that only the constructor has."""
    whole, listed = _whole(tree, path), tree.keys(path)
    rows = []
    for key in listed:
        if key.file == path:
            kind = described(_parameter(tree, whole, key, group).hint)
            rows.append([f"`{group}.{key.name}`", kind, f"`{value(key.default)}`", key.text])
    names = {key.name for key in listed}
    for prefix, node in _nodes(whole):
        for name, parameter in keys_of(_class(node, group)).items():
            dotted = f"{prefix}.{name}".lstrip(".")
            known = any(n == dotted or n.startswith(f"{dotted}.") for n in names) or name in node
            if not known and path.stem != "base":
                default = f"`{value(parameter.default)}`"
                rows.append([f"`{group}.{dotted}`", described(parameter.hint), default, ""])
    rows = [[row[0], row[1], row[2], _cell(row[3])] for row in rows]
    return _table(["key", "type", "default", "what it is"], rows) if rows else ""


def _parameter(tree: ConfigFiles, whole: dict[str, Any], key: Key, group: str) -> Parameter:
    """What the constructor of the nearest node says of a key; of an option that stands for others,
    what theirs say."""
    if f"{group}.{key.name}" in TAKEN:
        return Parameter(TAKEN[f"{group}.{key.name}"])
    if group == "ops" and key.name in OpTable.OPS:
        return Parameter(OpLibrary | str)
    node, parts = whole, key.name.split(".")
    owner, name = whole, parts[0]
    for i, part in enumerate(parts[:-1]):
        node = node[part] if isinstance(node.get(part), dict) else {}
        if "_target_" in node:
            owner, name = node, parts[i + 1]
    if owner.get("_target_", "auto") == "auto":
        others = (_whole(tree, path) for path in tree.options(group).values())
        classes = [_class(o, group) for o in others if o.get("_target_", "auto") != "auto"]
        return next((keys_of(c)[name] for c in classes if name in keys_of(c)), Parameter(Any))
    return keys_of(_class(owner, group)).get(name, Parameter(Any))


def _class(node: dict[str, Any], group: str) -> type:
    return find_class(node["_target_"], ["vllm_di"], f"conf/{group}", group)


def _nodes(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted key to node, of every node with a class."""
    if node.get("_target_", "auto") != "auto":
        yield prefix, node
    for name, inner in node.items():
        if isinstance(inner, dict):
            yield from _nodes(inner, f"{prefix}.{name}".lstrip("."))


def _whole(tree: ConfigFiles, path: Path) -> dict[str, Any]:
    """What a file holds, with what it builds on."""
    whole: dict[str, Any] = {}
    for file in reversed(tree.with_included(path)):
        whole = _merged(whole, tree.values(file))
    whole.pop("defaults", None)
    return whole


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(below[k], v) for k, v in above.items() if _are_dicts(below.get(k), v)}
    return below | above | both


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(each, dict) for each in values)


def _chosen(tree: ConfigFiles, path: Path) -> list[tuple[str, str]]:
    """Options of other groups that a file chooses."""
    found = ((g.partition("@")[0], o) for g, (o, _) in tree.read(path).chooses.items())
    return [(group, option) for group, option in found if group in tree.groups()]


def _platform(tree: ConfigFiles, option: str, path: Path) -> list[str]:
    whole, keys = _whole(tree, path), tree.keys(path)
    parts = [_cell(tree.read(path).summary)]
    chosen = [f"[`{g}={o}`]({g}.md#{_anchor(g, o)})" for g, o in _chosen(tree, path)]
    parts += [f"Chooses {', '.join(chosen)}."] if chosen else []
    for name in ("stages", "workers"):
        if name in whole:
            text = yaml.safe_dump({name: whole[name]}, sort_keys=False, default_flow_style=None)
            parts.append(f"```yaml\n{text}```")
    own = [key for key in keys if key.name.startswith("platform.")]
    others = [k for k in keys if k not in own and k.name.split(".")[0] not in ("stages", "workers")]
    for title, listed in (("It sets", others), ("Its manifest", own)):
        rows = [[f"`{k.name}`", f"`{value(k.default)}`", _cell(k.text or _said(k))] for k in listed]
        parts += [f"{title}:", _table(["key", "value", "what it is"], rows)] if rows else []
    return parts


def _said(key: Key) -> str:
    """What the manifest's class says of a key without a comment."""
    owner, _, field = key.name.rpartition(".")
    return field_texts(MANIFEST[owner]).get(field, "") if owner in MANIFEST else ""


def _manifest_fields() -> Iterator[str]:
    """What a manifest may say."""
    rows = []
    for prefix, cls in MANIFEST.items():
        texts = field_texts(cls)
        for field in msgspec.structs.fields(cls):
            if field.required:
                default = "required"
            elif isinstance(field.default, msgspec.Struct):
                continue  # its own fields are rows
            else:
                default = f"`{value(_plain(field.default))}`"
            name, kind = f"`{prefix}.{field.name}`", described(field.type)
            rows.append([name, kind, default, _cell(texts.get(field.name, ""))])
    yield "## The manifest"
    yield "What the node `platform` of an option may say. Conformance tests what it declares."
    yield _table(["key", "type", "default", "what it is"], rows)


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def commands() -> str:
    """Every verb with its flags."""
    parts = [
        "# Command line",
        "    vllm-di VERB [group=option ...] [key.in.a.node=value ...] [--flags]",
    ]
    rows = [[f"[`{verb}`](#{verb})", _cell(text)] for verb, text in VERBS.items()]
    parts.append(_table(["verb", "what it does"], rows))
    for verb, text in VERBS.items():
        words = f" {WORDS[verb]}" if verb in WORDS else ""
        more = "" if verb in WITHOUT_OVERRIDES else " [group=option ...] [key=value ...]"
        parts += [f"## {verb}", _sentence(text), f"    vllm-di {verb}{words}{more} [--flags]"]
        flags = VERB_SWITCHES.get(verb, {}) | VERB_OPTIONS.get(verb, {})
        parts += [_flags(flags)] if flags else []
    parts += ["## Flags of every verb", _flags(SWITCHES | OPTIONS)]
    short = {flag: f"short for `{text}`" for flag, (_, text) in ALIASES.items()}
    parts += ["## Flags that stand for overrides", _flags(short)]
    parts += [
        "## Tab completion",
        '`eval "$(vllm-di --completion bash)"`, or `zsh`, or for fish '
        "`vllm-di --completion fish | source`.",
    ]
    return "\n\n".join(parts) + "\n"


def _flags(flags: dict[str, str]) -> str:
    return _table(["flag", "what it does"], [[f"`{flag}`", _cell(t)] for flag, t in flags.items()])


def _sentence(text: str) -> str:
    return _cell(text[:1].upper() + text[1:]) + "."


def _anchor(group: str, option: str) -> str:
    return f"{group}-{option.replace('/', '-')}"


def _cell(text: str) -> str:
    """Text from a comment or docstring, for a page: no HTML, no column, Sphinx's quotes as
    Markdown's."""
    pieces = text.replace("``", "`").split("`")
    plain = (
        p.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;") for p in pieces[::2]
    )
    pieces[::2] = (piece.replace("*", "\\*").replace("_", "\\_") for piece in plain)
    return "`".join(pieces)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(folder: Path) -> None:
    for name, text in pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
