"""Assemblies on several platforms: the stages of a pipeline, each composed on its own.

A platform's YAML may hold ``stages``, a list of overrides for each. The user's overrides reach
every stage, those that begin with ``stages.N.`` the one. The engine and the server, of which there
is one, are composed beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from vllm_di.containers.compose import ConfigTree
from vllm_di.containers.origins import Origin
from vllm_di.containers.overrides import read
from vllm_di.containers.slots import SLOTS, WorkerContainer, slots
from vllm_di.containers.tree import ConfigFiles, shown
from vllm_di.errors import ConfigError

KEY = "stages"
SHARED = ("model", "loader")
"""Slots of the worker that the engine and the server read too: the checkpoint is found by them."""

_OF_STAGE = re.compile(r"(?P<sign>[+~]*)stages\.(?P<stage>[^.=]*)\.?(?P<rest>.*)", re.DOTALL)
_WORKER = tuple(slots(WorkerContainer))
_AROUND = tuple(slot for slot in SLOTS if slot not in _WORKER)


class Stage(msgspec.Struct, frozen=True):
    """What one stage is composed of, in the order of precedence."""

    overrides: list[str]
    sources: dict[str, Origin]
    """Override to its origin, where it was not typed in this form on the command line."""


class Split(msgspec.Struct, frozen=True):
    """A command line, shared out."""

    around: list[str]
    """Overrides for the engine and the server."""
    stages: list[Stage]
    """None on a platform without stages: ``around`` holds everything then."""


def split(
    tree: ConfigTree, overrides: Sequence[str], sources: Mapping[str, Origin] | None = None
) -> Split:
    """Share the user's overrides out over the stages of the platform. Raises ConfigError for
    stages that make no sense, and for ``stages.N`` where there is none."""
    common = [o for o in overrides if not _OF_STAGE.fullmatch(o) and read(o).key != KEY]
    platform = next((read(o).value for o in reversed(common) if read(o).key == "platform"), None)
    path, known = tree.options("platform").get(platform or ""), sources or {}
    listed = [] if path is None else read_stages(tree, path)
    own = [_of_stage(tree, o, platform, len(listed)) for o in overrides if o not in common]
    if path is None or not listed:
        return Split(list(overrides), [])
    _refuse_worker_keys(tree, path)
    stages = []
    for index, lines in enumerate(listed):
        origins = {text: Origin("platform", shown(path), line) for text, line in lines}
        stage_overrides = [text for text, _ in lines]
        for text in (o for o in common if read(o).slot not in (*_AROUND, "platform")):
            stage_overrides.append(text)
            origins[text] = known.get(text) or Origin("command line", text=text)
        for stage, text, typed in own:
            if stage == index:
                stage_overrides.append(text)
                origins[text] = known.get(typed) or Origin("command line", text=typed)
        stages.append(_checked(tree, index, Stage(_last_of_each(stage_overrides), origins)))
    around = [o for o in common if read(o).slot not in _WORKER or read(o).slot in SHARED]
    return Split(around, stages)


def has_stages(tree: ConfigFiles, platform: str) -> bool:
    """Whether an option of the group ``platform`` has stages."""
    path = tree.options("platform").get(platform)
    return path is not None and KEY in tree.read(path).lines


def read_stages(tree: ConfigFiles, path: Path) -> list[list[tuple[str, int]]]:
    """The (override, line) of each stage in a platform's YAML; nothing in one without stages.
    Raises ConfigError."""
    line = tree.read(path).lines.get(KEY)
    if line is None:
        return []
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    node = next(value for key, value in root.value if key.value == KEY)
    good = isinstance(node, yaml.SequenceNode) and node.value
    if not good or not all(isinstance(stage, yaml.SequenceNode) for stage in node.value):
        raise ConfigError(
            f"{shown(path)}:{line}: stages: expected a list with one list of overrides for each "
            "stage, such as [platform=cpu, 'model.layers=[0,8]']"
        )
    stages = []
    for index, stage in enumerate(node.value):
        for item in stage.value:
            if not isinstance(item, yaml.ScalarNode) or "=" not in item.value:
                raise ConfigError(
                    f"{shown(path)}:{item.start_mark.line + 1}: stages.{index}: expected an "
                    "override such as attention=sdpa, in quotes where it holds a comma or a colon"
                )
        stages.append([(item.value, item.start_mark.line + 1) for item in stage.value])
    return stages


def check_layers(workers: list[dict[str, Any]], place: Any) -> None:
    """The stages' layers must be those of the model, each once and in order. Raises ConfigError;
    ``place`` gives the file and line of a dotted key."""
    models = [nodes["model"] for nodes in workers]
    _same_model(models, place)
    count, end = models[0].get("num_hidden_layers"), 0
    for index, model in enumerate(models):
        key = f"stages.{index}.model.layers"
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
                f"after it; set {key} and stages.{index + 1}.model.layers"
            )
        if last and count is not None and stop != count:
            raise ConfigError(
                f"{place(key)}: {key} is {layers}, but the model has {count} layers "
                f"(model.num_hidden_layers): end with {count} or null"
            )
        end = stop


def _same_model(models: list[dict[str, Any]], place: Any) -> None:
    apart = ("layers", "dtype", "_target_", "implementation")
    for index, model in enumerate(models[1:], 1):
        for key in {**models[0], **model}:
            ours, theirs = models[0].get(key), model.get(key)
            if key not in apart and ours != theirs:
                one, other = f"stages.0.model.{key}", f"stages.{index}.model.{key}"
                raise ConfigError(
                    f"{place(other)}: {other} is {theirs!r}, but {one} is {ours!r} "
                    f"({place(one)}): the stages are one model"
                )


# ------------------------------------------------------------------------------------------------


def _of_stage(
    tree: ConfigTree, text: str, platform: str | None, count: int
) -> tuple[int, str, str]:
    """``stages.1.attention=sdpa`` -> (1, ``attention=sdpa``, as typed)."""
    with_stages = [n for n, p in tree.options("platform").items() if KEY in tree.read(p).lines]
    if not count:
        there = ", ".join(with_stages) or "none"
        raise ConfigError(
            f"command line: {text!r}: platform={platform or 'auto'} has no stages; "
            f"platforms that have: {there}"
        )
    match = _OF_STAGE.fullmatch(text)
    stage, rest = (match["stage"], match["rest"]) if match else ("", "")
    if not stage.isdigit() or int(stage) >= count:
        numbers = ", ".join(f"stages.{n}" for n in range(count))
        raise ConfigError(
            f"command line: {text!r}: no such stage; platform={platform} has {numbers}, and its "
            "YAML lists them; write stages.N.KEY=VALUE"
        )
    if not read(rest).key:
        raise ConfigError(f"command line: {text!r}: write stages.{stage}.KEY=VALUE")
    if (slot := read(rest).slot) in _AROUND:
        raise ConfigError(
            f"command line: {text!r}: there is one {slot} for all stages: write {rest}"
        )
    return int(stage), f"{match['sign'] if match else ''}{rest}", text


def _refuse_worker_keys(tree: ConfigTree, path: Path) -> None:
    """What a platform with stages says of a worker would reach none of its workers."""
    file = tree.read(path)
    worker_keys = {key: line for key, line in file.lines.items() if key.split(".")[0] in _WORKER}
    worker_keys |= {group: line for group, (_, line) in file.chooses.items() if group in _WORKER}
    for key, line in worker_keys.items():
        raise ConfigError(
            f"{shown(path)}:{line}: {key}: a platform with stages fills the slots of its workers "
            f"in `stages`: write {key}=... in the list of each"
        )


def _checked(tree: ConfigTree, index: int, stage: Stage) -> Stage:
    text = next((o for o in stage.overrides if read(o).key == "platform"), None)
    options = tree.options("platform")
    if text is None:
        plain = [n for n, p in options.items() if KEY not in tree.read(p).lines]
        raise ConfigError(
            f"{next(iter(stage.sources.values()), 'stages')}: stages.{index} names no platform; "
            f"begin it with platform=NAME, of {', '.join(plain)}"
        )
    path = options.get(read(text).value)
    if path is not None and KEY in tree.read(path).lines:
        raise ConfigError(
            f"{stage.sources[text]}: stages.{index}: {text} has stages itself; "
            "name a platform without"
        )
    return stage


def _last_of_each(overrides: list[str]) -> list[str]:
    """One override for each key: the last."""
    return list({read(text).key: text for text in overrides}.values())
