"""Assemblies on several platforms: workers of several roles, the model of each role cut into the
stages of a pipeline, each stage composed on its own.

A platform's YAML may hold ``stages``, a list of overrides for each, or ``workers``, such a list for
each role. The user's overrides reach every stage; those that begin with ``ROLE.`` one role, with
``stages.N.`` one stage. The engine and the server, of which there is one, are composed beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from vllm_di.components.interfaces import DEFAULT_ROLE
from vllm_di.containers.compose import ConfigTree
from vllm_di.containers.origins import Origin
from vllm_di.containers.overrides import read
from vllm_di.containers.slots import SLOTS, WorkerContainer, slots
from vllm_di.containers.tree import ConfigFiles, shown
from vllm_di.errors import ConfigError, nearest

KEY = "stages"
WORKERS = "workers"
SHARED = ("model", "loader")
"""Slots of the worker that the engine and the server read too: the checkpoint is found by them."""

_WORKER = tuple(slots(WorkerContainer))
_AROUND = tuple(slot for slot in SLOTS if slot not in _WORKER)


class Stage(msgspec.Struct, frozen=True):
    """The overrides of one stage, in the order of precedence."""

    overrides: list[str]
    sources: dict[str, Origin]
    """Override to its origin, where it was not typed in this form on the command line."""


class Split(msgspec.Struct, frozen=True):
    """A command line, shared out."""

    around: list[str]
    """Overrides for the engine and the server."""
    roles: dict[str, list[Stage]]
    """Role to its stages. Empty on a platform without: ``around`` holds everything then."""


def split(
    tree: ConfigTree, overrides: Sequence[str], sources: Mapping[str, Origin] | None = None
) -> Split:
    """Share the user's overrides out over the workers of the platform. Raises ConfigError for
    roles or stages that make no sense, and for an override of one that is not there."""
    chosen = (read(o).value for o in reversed(overrides) if read(o).key == "platform")
    platform, known = next(chosen, None), sources or {}
    path = tree.options("platform").get(platform or "")
    listed = {} if path is None else read_stages(tree, path)
    for text in overrides:
        _refuse_unknown_role(tree, text, platform, listed, known)
    own = [
        _of_worker(tree, text, platform, listed, known)
        for text in overrides
        if read(text).slot in (KEY, WORKERS, *(listed.keys() - {DEFAULT_ROLE}))
    ]
    typed = [reach.typed for reach in own]
    common = [o for o in overrides if o not in typed]
    if path is None or not listed:
        return Split(list(overrides), {})
    _refuse_worker_keys(tree, path)
    roles: dict[str, list[Stage]] = {role: [] for role in listed}
    for role, stages in listed.items():
        for index, lines in enumerate(stages):
            texts = [text for text, _ in lines]
            origins = {text: Origin("platform", shown(path), line) for text, line in lines}
            for text in (o for o in common if read(o).slot not in (*_AROUND, "platform")):
                texts.append(text)
                origins[text] = known.get(text) or Origin("command line", text=text)
            for reach in sorted(own, key=lambda reach: reach.stage is not None):
                if reach.role == role and reach.stage in (None, index):
                    texts.append(reach.text)
                    typed_origin = Origin("command line", text=reach.typed)
                    origins[reach.text] = known.get(reach.typed) or typed_origin
            stage = Stage(_last_of_each(texts), origins)
            roles[role].append(_checked(tree, prefix(role, index, len(stages)), stage))
    around = [o for o in common if read(o).slot not in _WORKER or read(o).slot in SHARED]
    return Split(around, roles)


def prefix(role: str, stage: int, num_stages: int) -> str:
    """Prefix of one worker's keys: ``prefill.``, ``stages.1.``, ``decode.stages.0.``, or
    nothing."""
    of_role = "" if role == DEFAULT_ROLE else f"{role}."
    return f"{of_role}{KEY}.{stage}." if num_stages > 1 else of_role


def has_stages(tree: ConfigFiles, platform: str) -> bool:
    """Whether an option of the group ``platform`` has stages or roles."""
    path = tree.options("platform").get(platform)
    return path is not None and _has(tree, path)


def _has(tree: ConfigFiles, path: Path) -> bool:
    lines = tree.read(path).lines
    return KEY in lines or WORKERS in lines


Lines = list[tuple[str, int]]
"""The (override, line) of one stage."""


def read_stages(tree: ConfigFiles, path: Path) -> dict[str, list[Lines]]:
    """Role to its stages in a platform's YAML; a plain list is the role ``default``; nothing in
    one without. Raises ConfigError."""
    lines = tree.read(path).lines
    if KEY not in lines and WORKERS not in lines:
        return {}
    if KEY in lines and WORKERS in lines:
        raise ConfigError(
            f"{shown(path)}:{lines[KEY]}: stages: {WORKERS} (line {lines[WORKERS]}) names the "
            "stages of each role; leave one of the two out"
        )
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    nodes = {key.value: value for key, value in root.value}
    if KEY in nodes:
        return {DEFAULT_ROLE: _stages_of(nodes[KEY], f"{shown(path)}:{lines[KEY]}", path, KEY)}
    if not isinstance(nodes[WORKERS], yaml.MappingNode) or not nodes[WORKERS].value:
        raise ConfigError(
            f"{shown(path)}:{lines[WORKERS]}: workers: expected a mapping of roles to stages, such "
            "as prefill: [[platform=cpu]]"
        )
    roles = {}
    taken = (*SLOTS, *tree.groups(), KEY, WORKERS)
    for key, value in nodes[WORKERS].value:
        place, role = f"{shown(path)}:{key.start_mark.line + 1}", str(key.value)
        if not role.isidentifier() or role in taken:
            why = "is a name of the config" if role in taken else "is not a name"
            raise ConfigError(
                f"{place}: workers.{role}: {role!r} {why}; call the role something else"
            )
        roles[role] = _stages_of(value, place, path, f"{WORKERS}.{role}")
    return roles


def _stages_of(node: yaml.Node, place: str, path: Path, key: str) -> list[Lines]:
    """The stages of one role. Raises ConfigError."""
    good = isinstance(node, yaml.SequenceNode) and node.value
    if not good or not all(isinstance(stage, yaml.SequenceNode) for stage in node.value):
        raise ConfigError(
            f"{place}: {key}: expected a list with one list of overrides for each "
            "stage, such as [platform=cpu, 'model.layers=[0,8]']"
        )
    stages = []
    for index, stage in enumerate(node.value):
        for item in stage.value:
            if not isinstance(item, yaml.ScalarNode) or "=" not in item.value:
                raise ConfigError(
                    f"{shown(path)}:{item.start_mark.line + 1}: {key}.{index}: expected an "
                    "override such as attention=sdpa, in quotes where it holds a comma or a colon"
                )
        stages.append([(item.value, item.start_mark.line + 1) for item in stage.value])
    return stages


def check_layers(
    workers: list[dict[str, Any]], place: Callable[[str], str], role: str = DEFAULT_ROLE
) -> None:
    """The layers of a role's stages must be those of the model, each once and in order. Raises
    ConfigError; ``place`` gives the file and line of a dotted key."""
    models = [nodes["model"] for nodes in workers]
    if len(models) == 1 and models[0].get("layers") is None:
        return
    keys = [prefix(role, index, len(models)) + "model" for index in range(len(models))]
    _same_model(models, keys, place)
    count, end = models[0].get("num_hidden_layers"), 0
    for index, model in enumerate(models):
        key = f"{keys[index]}.layers"
        layers = model.get("layers")
        if not isinstance(layers, list) or len(layers) != 2 or not isinstance(layers[0], int):
            raise ConfigError(
                f"{place(key)}: {key}: expected [first, end], the layers of this stage, "
                f"got {layers!r}"
            )
        first, last = layers[0], index == len(models) - 1
        stop = count if layers[1] is None else layers[1]
        if first != end:
            lost = f"[{end}, {first}] run nowhere" if first > end else f"[{first}, {end}] run twice"
            before = "the model starts at 0" if index == 0 else f"the stage before ends at {end}"
            raise ConfigError(f"{place(key)}: {key} is {layers}, but {before}: the layers {lost}")
        if not last and (stop is None or (count is not None and stop >= count)):
            raise ConfigError(
                f"{place(key)}: {key} is {layers}, which leaves no layer of {count} to the stages "
                f"after it; set {key} and {keys[index + 1]}.layers"
            )
        if last and count is not None and stop != count:
            raise ConfigError(
                f"{place(key)}: {key} is {layers}, but the model has {count} layers "
                f"(model.num_hidden_layers): end with {count} or null"
            )
        end = stop


def _same_model(models: list[dict[str, Any]], keys: list[str], place: Callable[[str], str]) -> None:
    apart = ("layers", "dtype", "_target_", "implementation")
    for index, model in enumerate(models[1:], 1):
        for key in {**models[0], **model}:
            ours, theirs = models[0].get(key), model.get(key)
            if key not in apart and ours != theirs:
                one, other = f"{keys[0]}.{key}", f"{keys[index]}.{key}"
                raise ConfigError(
                    f"{place(other)}: {other} is {theirs!r}, but {one} is {ours!r} "
                    f"({place(one)}): the stages are one model"
                )


# ------------------------------------------------------------------------------------------------


class _Reach(msgspec.Struct, frozen=True):
    """An override of one role or one stage."""

    role: str
    stage: int | None
    """None: every stage of the role."""
    text: str
    """``attention=sdpa``."""
    typed: str
    """``decode.stages.1.attention=sdpa``."""


def _refuse_unknown_role(
    tree: ConfigTree,
    text: str,
    platform: str | None,
    listed: dict[str, list[Lines]],
    known: Mapping[str, Origin],
) -> None:
    """Raise ConfigError for ``ROLE.SLOT...`` and ``ROLE.stages...`` of a role that is not there,
    and for a misspelt ``stages.N``."""
    role, *rest = read(text).key.split(".")
    if not rest or not (rest[0].isdigit() or rest[0] in (*SLOTS, KEY)):
        return
    top = tree.read(tree.roots[0] / "config.yaml").lines
    if role in (*SLOTS, KEY, WORKERS, "hydra", *top, *listed, *tree.groups()):
        return
    if rest[0].isdigit():
        hint = nearest(role, [KEY])
        if hint:
            raise ConfigError(f"{_place(text, known)}: no key {role!r}{hint}")
    else:
        roles = [name for name in listed if name != DEFAULT_ROLE]
        there = f"it has {', '.join(roles)}" if roles else "it names no roles"
        raise ConfigError(
            f"{_place(text, known)}: platform={platform or 'auto'} has no role {role!r}; {there}"
            f"{nearest(role, roles)}"
        )


def _place(text: str, known: Mapping[str, Origin]) -> str:
    source = known.get(text)
    return f"{source.chosen_by if source else 'command line'}: {text!r}"


def _of_worker(
    tree: ConfigTree,
    text: str,
    platform: str | None,
    listed: dict[str, list[Lines]],
    known: Mapping[str, Origin],
) -> _Reach:
    place = _place(text, known)
    if not listed:
        there = ", ".join(n for n, p in tree.options("platform").items() if _has(tree, p))
        raise ConfigError(
            f"{place}: platform={platform or 'auto'} has no stages; "
            f"platforms that have: {there or 'none'}"
        )
    sign, key, equals, value = read(text)
    role, rest = DEFAULT_ROLE, key
    if key.split(".")[0] in listed:
        role, _, rest = key.partition(".")
    if role not in listed:
        raise ConfigError(
            f"{place}: platform={platform} has workers of the roles {', '.join(listed)}: write "
            "ROLE.KEY=VALUE or ROLE.stages.N.KEY=VALUE"
        )
    count, stage = len(listed[role]), None
    if rest.split(".")[0] == KEY:
        _, number, rest = [*rest.split(".", 2), "", ""][:3]
        form = prefix(role, 0, 2).removesuffix("0.") + "N.KEY=VALUE"
        if not number.isdigit() or int(number) >= count:
            numbers = ", ".join(prefix(role, n, 2).rstrip(".") for n in range(count))
            raise ConfigError(
                f"{place}: no such stage; platform={platform} has {numbers}, and its "
                f"YAML lists them; write {form}"
            )
        stage = int(number)
    if not rest:
        before = prefix(role, stage or 0, 1 if stage is None else 2)
        raise ConfigError(f"{place}: write {before}KEY=VALUE")
    if (slot := rest.split(".")[0]) in _AROUND:
        raise ConfigError(
            f"{place}: there is one {slot} for all stages: write {rest}{equals}{value}"
        )
    return _Reach(role, stage, f"{sign}{rest}{equals}{value}", text)


def _refuse_worker_keys(tree: ConfigTree, path: Path) -> None:
    """Keys that a platform with stages sets for a worker would reach none of its workers."""
    file = tree.read(path)
    worker_keys = {key: line for key, line in file.lines.items() if key.split(".")[0] in _WORKER}
    worker_keys |= {group: line for group, (_, line) in file.chooses.items() if group in _WORKER}
    for key, line in worker_keys.items():
        raise ConfigError(
            f"{shown(path)}:{line}: {key}: a platform with stages fills the slots of its workers "
            f"in `{KEY}` or `{WORKERS}`: write {key}=... in the list of each"
        )


def _checked(tree: ConfigTree, before: str, stage: Stage) -> Stage:
    name = before.rstrip(".") or KEY
    text = next((o for o in stage.overrides if read(o).key == "platform"), None)
    options = tree.options("platform")
    if text is None:
        plain = [n for n, p in options.items() if not _has(tree, p)]
        raise ConfigError(
            f"{next(iter(stage.sources.values()), 'stages')}: {name} names no platform; "
            f"begin it with platform=NAME, of {', '.join(plain)}"
        )
    path = options.get(read(text).value)
    if path is not None and _has(tree, path):
        raise ConfigError(
            f"{stage.sources[text]}: {name}: {text} has stages itself; name a platform without"
        )
    return stage


def _last_of_each(overrides: list[str]) -> list[str]:
    """The last override of each key."""
    return list({read(text).key: text for text in overrides}.values())
