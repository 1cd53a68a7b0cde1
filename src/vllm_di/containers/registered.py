"""Architectures that a model option registers: ``architectures: [X]`` in its YAML lets
``model=local`` find it for a checkpoint of that architecture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_di.containers.compose import Composition, ConfigTree
from vllm_di.containers.origins import Origin
from vllm_di.containers.overrides import read
from vllm_di.containers.tree import shown
from vllm_di.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

KEY = "architectures"


def compose(
    tree: ConfigTree, overrides: Sequence[str], sources: Mapping[str, Origin] | None = None
) -> Composition:
    """``tree.compose``; then, where ``model=local`` meets a checkpoint whose architecture an option
    registers, the same with that option. Raises ConfigError when two options claim it."""
    composition = tree.compose(overrides, sources)
    found = _registered(tree, composition)
    if found is None:
        return composition
    option, architecture, file = found
    text = f"model={option}"
    origin = Origin("checkpoint", text=f"{architecture} is registered by {shown(file)}")
    others = [o for o in overrides if read(o).key != "model"]
    return tree.compose([text, *others], {**(sources or {}), text: origin})


def _registered(tree: ConfigTree, composition: Composition) -> tuple[str, str, Path] | None:
    """-> (option, architecture, its file), where one stands for the checkpoint."""
    # imported here: most starts have no option that registers anything
    from vllm_di.models.checkpoint import describe
    from vllm_di.models.hf_config import architecture_of, is_native

    model, target = composition.values.model, composition.origins.get("model._target_")
    chosen = target is not None and target.by_user
    if composition.choices["model"][0] != "local" or model.get("path") is None or chosen:
        return None
    if model.get("implementation") != "auto":
        return None
    claims = registrations(tree)
    if not claims:
        return None
    try:
        architecture = architecture_of(describe(str(model.path)).hf_config)
    except CheckpointError:
        return None  # reported later, when the checkpoint's values are read
    files = claims.get(architecture, {})
    if len(files) > 1:
        names = ", ".join(f"model={o} ({shown(f)})" for o, f in files.items())
        raise ConfigError(f"{architecture} is registered by several options: {names}; name one")
    for option, file in files.items():
        if not is_native(architecture):
            return option, architecture, file
        log.warning(
            "%s registers %s, which the shipped decoder runs; model=%s takes the option's class",
            shown(file),
            architecture,
            option,
        )
    return None


def registrations(tree: ConfigTree) -> dict[str, dict[str, Path]]:
    """Architecture to the options that register it, each with its file."""
    found: dict[str, dict[str, Path]] = {}
    for option, path in tree.options("model").items():
        try:
            file = tree.read(path)
        except ConfigError as error:  # an option that is not asked for stops nobody
            log.warning("model=%s is passed over: %s", option, error)
            continue
        if KEY not in file.lines:
            continue
        names = tree.values(path)[KEY]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            place = f"{shown(path)}:{file.lines[KEY]}"
            log.warning("%s: model.%s: expected a list of class names, got %r", place, KEY, names)
            continue
        for name in names:
            found.setdefault(name, {})[option] = path
    return found
