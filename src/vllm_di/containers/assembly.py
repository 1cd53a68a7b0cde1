"""The assembly: the composed config as plain data, one node for each slot. It is what crosses a
process boundary."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from dependency_injector.containers import DeclarativeContainer
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vllm_di.components.interfaces import DEFAULT_ROLE
from vllm_di.containers.compose import Composition, ConfigTree
from vllm_di.containers.evidence import Recorded, read_recorded, shown_level
from vllm_di.containers.manifest import LEVELS, Level, Manifest, read_manifest
from vllm_di.containers.nested import replace_option, resolve_nested
from vllm_di.containers.origins import Origin, place_of
from vllm_di.containers.registered import KEY as ARCHITECTURES
from vllm_di.containers.registered import compose
from vllm_di.containers.slots import (
    SLOTS,
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)
from vllm_di.containers.stages import KEY, WORKERS, Stage, check_layers, prefix, split
from vllm_di.containers.tree import shown
from vllm_di.errors import CheckpointError, ConfigError, nearest

SETTINGS = (
    "model_name",
    "trust",
    "generation_config",
    "checkpoint",
    "claimed_level",
    "platform",
)
"""Top-level keys that are no slots."""

GIVE_WEIGHTS = (
    "give them with model.path=FOLDER, FILE.gguf or a hub name (org/name), or run with random "
    "weights: loader=dummy"
)
MISSING = "missing: model.path; set it to FOLDER, FILE.gguf or a hub name, or take loader=dummy"
"""Placeholder in an incomplete assembly for a value of the checkpoint."""
STAND_INS = {"tokenizer": "bytes", "chat_template": "plain"}
"""Options for a model without a checkpoint, unless the user chose others."""

SHIPPED_MODEL = "vllm_di.models.decoder.Decoder"
"""The only class that transformers' code may replace."""
TRANSFORMERS_MODEL = "vllm_di.models.transformers_fallback.TransformersModel"


class Choice(msgspec.Struct, frozen=True):
    """The option that fills a slot, and who chose it."""

    option: str
    origin: Origin


class Assembly(msgspec.Struct):
    """All that any process needs to build its container, as plain data."""

    server: dict[str, Any]
    engine: dict[str, Any]
    workers: dict[str, list[dict[str, Any]]]
    """Role to its workers, one for each stage of a pipeline. On a platform that names no roles
    there is one, ``default``."""
    settings: dict[str, Any]
    origins: dict[str, Origin]
    choices: dict[str, Choice]
    packages: list[str]
    """Packages whose classes a node may name."""
    warnings: list[str] = []
    """Parts of the config that are not used: a broken port, an unsupported sampling value."""
    missing: dict[str, str] = {}
    """Dotted key of a slot that cannot be filled yet, and what to set for it. Empty in an assembly
    that can run."""
    role: str = DEFAULT_ROLE
    """The role whose workers ``stages``, ``nodes``, ``path`` and ``platform_of`` return."""

    def of_role(self, role: str) -> Assembly:
        """The same assembly as seen by another role. Raises ConfigError."""
        if role not in self.workers:
            raise ConfigError(
                f"{self.choices['platform'].origin}: platform={self.platform.name} has no workers "
                f"of the role {role!r}; it has {', '.join(self.workers)}"
                f"{nearest(role, self.workers)}"
            )
        return msgspec.structs.replace(self, role=role)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The workers of the role."""
        return self.workers[self.role]

    def prefix(self, stage: int) -> str:
        """Prefix of a worker's keys: ``stages.1.``, ``decode.``, or nothing."""
        return prefix(self.role, stage, len(self.stages))

    def nodes(self, container: type[DeclarativeContainer], stage: int = 0) -> dict[str, Any]:
        """Slot to node for one container."""
        if container is ServerContainer:
            return self.server
        return self.engine if container is EngineContainer else self.stages[stage]

    @property
    def platform(self) -> Manifest:
        """The platform's manifest, as it was checked."""
        return msgspec.convert(self.settings["platform"], Manifest)

    @property
    def announcement(self) -> str:
        """The line about the platform and its level that a start prints."""
        return self.platform.announcement(self.settings["claimed_level"])

    def platform_of(self, stage: int) -> Manifest:
        """A stage's manifest; the whole platform's where there are no stages."""
        platforms = self.settings.get(WORKERS)
        if not platforms:
            return self.platform
        return msgspec.convert(platforms[self.role][stage], Manifest)

    def path(self, container: type[DeclarativeContainer], slot: str, stage: int = 0) -> str:
        """The dotted key of a slot's node: ``attention``, or ``stages.1.attention``."""
        return f"{self.prefix(stage)}{slot}" if container is WorkerContainer else slot

    def place(self, key: str) -> str:
        """Where the value of a dotted key came from, for messages; a parent's place when it has
        none itself."""
        return place_of(self.origins, key)

    def encode(self) -> bytes:
        """As JSON, which people can read and every process can decode."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(data: bytes) -> Assembly:
        """Back from ``encode``. Raises msgspec.ValidationError."""
        return msgspec.json.decode(data, type=Assembly)


def assemble(
    overrides: Sequence[str] = (),
    config_dirs: Iterable[str | Path] = (),
    *,
    incomplete: bool = False,
    sources: Mapping[str, Origin] | None = None,
) -> Assembly:
    """Compose, look into the checkpoint, and split by container. Raises ConfigError or
    CheckpointError.

    ``incomplete``: to be looked at, not to run. A model without weights is no error then: what it
    lacks is in ``missing``, and in the values that a checkpoint would fill.
    ``sources``: override to its origin, where it was not typed on the command line.
    Nothing is imported from a component here: classes are checked by ``schema.check`` in the
    process that builds them.
    """
    tree = ConfigTree.find(config_dirs)
    reports, unreadable = read_recorded(tree)
    parts = split(tree, overrides, sources or {})
    whole = compose(tree, parts.around, sources)
    values = _resolved(tree, whole, reports, incomplete)
    assembly = Assembly(
        server={s: values[s] for s in slots(ServerContainer)},
        engine={s: values[s] for s in slots(EngineContainer)},
        workers={DEFAULT_ROLE: [{s: values[s] for s in slots(WorkerContainer)}]},
        settings={s: values.get(s) for s in SETTINGS},
        origins=dict(whole.origins),
        choices={group: Choice(*choice) for group, choice in whole.choices.items()},
        packages=["vllm_di", *_ports(tree), *_trusted(values.get("trust"))],
        warnings=[*tree.warnings(), *unreadable, *_left_out(values)],
        missing=dict(whole.missing),
    )
    if not parts.roles:
        return assembly
    return _add_workers(assembly, tree, whole, parts.roles, reports, incomplete)


def _add_workers(
    assembly: Assembly,
    tree: ConfigTree,
    whole: Composition,
    roles: dict[str, list[Stage]],
    reports: list[Recorded],
    incomplete: bool,
) -> Assembly:
    """The workers of each role and stage in place of the one; their keys have a ``prefix``."""
    workers = slots(WorkerContainer)
    for key in [k for k in assembly.origins if k.split(".")[0] in workers]:
        del assembly.origins[key]
    for slot in workers:
        del assembly.choices[slot]
    assembly.workers, assembly.role = {role: [] for role in roles}, next(iter(roles))
    platforms: dict[str, list[Any]] = {role: [] for role in roles}
    assembly.settings[WORKERS] = platforms
    assembly.missing = {k: v for k, v in assembly.missing.items() if k not in workers}
    for role, stages in roles.items():
        for index, stage in enumerate(stages):
            before = prefix(role, index, len(stages))
            try:
                composition = compose(tree, stage.overrides, stage.sources)
                for slot in (*assembly.server, *assembly.engine):
                    composition.values[slot] = whole.values[slot]  # a worker may interpolate them
                values = _resolved(tree, composition, reports, incomplete)
            except ConfigError as error:
                raise type(error)(f"{before.rstrip('.') or KEY}: {error}") from None
            assembly.workers[role].append({s: values[s] for s in workers})
            platforms[role].append(values["platform"])
            assembly.missing |= {f"{before}{k}": v for k, v in composition.missing.items()}
            for key, origin in composition.origins.items():
                if key.split(".")[0] in workers or (before and key.split(".")[0] == "platform"):
                    assembly.origins[f"{before}{key}"] = origin
            for group, choice in composition.choices.items():
                if group in workers or (before and group == "platform"):
                    assembly.choices[f"{before}{group}"] = Choice(*choice)
        if not assembly.missing:
            check_layers(assembly.workers[role], assembly.place, role)
    return assembly


def _resolved(
    tree: ConfigTree, composition: Composition, reports: list[Recorded], incomplete: bool
) -> dict[str, Any]:
    """Plain data, with the values of the checkpoint, checked for slots and settings."""
    if not isinstance(composition.values.get("platform"), DictConfig):
        path = tree.options("platform")[composition.choices["platform"][0]]
        raise ConfigError(f"{shown(path)}: platform: expected a mapping")
    _resolve_checkpoint(tree, composition, incomplete)
    resolve_nested(tree, composition)
    _lower_level(composition, reports)
    values = _plain(composition)
    known = [*SLOTS, *SETTINGS, KEY, WORKERS]
    for key in values:
        if key not in known:
            place = composition.origins.get(key, "config")
            raise ConfigError(
                f"{place}: {key!r} is neither a slot nor a setting{nearest(key, known)}"
            )
    for slot in SLOTS:
        if not isinstance(values.get(slot), dict):
            place = composition.origins.get(slot, "config")
            raise ConfigError(f"{place}: slot {slot!r} must be a mapping with a _target_")
    values["platform"] = _checked_manifest(tree, composition, values["platform"])
    return values


def _ports(tree: ConfigTree) -> list[str]:
    return [p.package.split(".")[0] for p in tree.ports if not p.problem]


def _lower_level(composition: Composition, reports: list[Recorded]) -> None:
    """A level is what a recorded report shows: what the manifest says beyond it becomes
    ``claimed_level``. What runs on a simulated device is contract-tested at most."""
    values = composition.values
    level = values.platform.get("level")
    if level not in LEVELS:
        return  # the manifest's check says so
    shown = shown_level(reports, composition.choices["platform"][0])
    if LEVELS.index(level) > LEVELS.index(shown):
        place = place_of(composition.origins, "platform.level")
        values.claimed_level = level
        composition.origins["claimed_level"] = Origin("auto", text=f"{place}, without a report")
        level, why = shown, "what a recorded conformance report shows"
        _set_level(composition, level, why)
    simulated = OmegaConf.select(values, "device.simulated") is True
    if simulated and LEVELS.index(level) > LEVELS.index("contract-tested"):
        _set_level(composition, "contract-tested", "the device is simulated")


def _set_level(composition: Composition, level: Level, why: str) -> None:
    composition.values.platform.level = level
    composition.origins["platform.level"] = Origin("auto", text=why)


def _checked_manifest(tree: ConfigTree, composition: Composition, node: Any) -> dict[str, Any]:
    option = composition.choices["platform"][0]
    owner = tree.port_of(tree.options("platform")[option])
    manifest = read_manifest(
        node, option, lambda key: place_of(composition.origins, key), out_of_tree=owner is not None
    )
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(manifest))
    return plain


def _plain(composition: Composition) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(composition.values, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        place = composition.origins.get(key, "config")
        raise ConfigError(f"{place}: {key}: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _trusted(value: Any) -> list[str]:
    packages = value or []
    if not isinstance(packages, list) or not all(
        isinstance(p, str) and p.isidentifier() for p in packages
    ):
        raise ConfigError(f"trust: expected a list of top-level package names, got {value!r}")
    return packages


def _resolve_checkpoint(tree: ConfigTree, composition: Composition, incomplete: bool) -> None:
    """Fill ``checkpoint``, and the keys of ``model`` that the YAML leaves to the checkpoint."""
    # imported here: `vllm-di --help` composes without a checkpoint
    from vllm_di.models.checkpoint import describe
    from vllm_di.models.generation_config import sampling_defaults
    from vllm_di.models.hf_config import read_fields

    values = composition.values
    model, checkpoint = values.model, values.checkpoint
    option, chosen = composition.choices["model"]
    loader = composition.choices["loader"][0]
    registered = _pop_architectures(composition)
    takes_sampling = _takes_sampling(composition)
    if values.model_name is None:
        found_by_path = option == "local" or chosen.chosen_by == "checkpoint"
        named = not found_by_path or model.get("path") is None
        values.model_name = option if named else Path(str(model.path)).stem
    if model.get("path") is None:
        if loader != "auto":
            for slot, option in STAND_INS.items():
                if not _is_chosen(composition, slot):
                    replace_option(tree, composition, slot, option, "no checkpoint brings its own")
        elif incomplete:
            _note_missing(composition)
        else:
            raise ConfigError(f"{chosen}: model={option} brings no weights; {GIVE_WEIGHTS}")
    else:
        description = describe(str(model.path))
        checkpoint.format, checkpoint.weights = description.format, description.weights
        checkpoint.tokenizer = description.tokenizer
        if takes_sampling:
            place = f"{model.path}: generation_config.json"
            sampling, left_out = sampling_defaults(description.generation_config, place)
            checkpoint.sampling, checkpoint.left_out = sampling, left_out
        own = [str(key) for key in model] if _is_own_class(composition) else None
        native = model.get("implementation") != "transformers"
        config, generation = description.hf_config, description.generation_config
        try:
            fields = read_fields(config, generation, own=own, native=native)
        except CheckpointError as error:
            raise type(error)(f"{model.path}: {error}") from error
        if registered and fields["architecture"] not in registered:
            raise ConfigError(
                f"{chosen}: model={option} is for {', '.join(registered)}, but the checkpoint "
                f"{model.path} is a {fields['architecture']}; take model=local"
            )
        for key, value in fields.items():
            _take(composition, key, value)
        if loader == "auto":
            replace_option(
                tree,
                composition,
                "loader",
                description.format,
                f"{Path(description.weights).name} is {description.format}",
            )
    _fall_back(composition)


def _note_missing(composition: Composition) -> None:
    """Put what is missing in place of each value of the checkpoint."""
    values, missing = composition.values, composition.missing
    values.checkpoint.weights = values.checkpoint.tokenizer = MISSING
    values.loader._target_ = missing["loader"] = MISSING
    if not values.model.get("architecture"):
        missing["model"] = MISSING  # every key of its would come from there


def _left_out(values: dict[str, Any]) -> list[str]:
    place = f"{values['model'].get('path')}: generation_config.json"
    names = values["checkpoint"]["left_out"]
    return [f"{place}: {name} is not supported, and left out" for name in names]


def _takes_sampling(composition: Composition) -> bool:
    choice = composition.values.generation_config
    if choice not in ("checkpoint", "none"):
        raise ConfigError(
            f"{place_of(composition.origins, 'generation_config')}: generation_config: expected "
            f"checkpoint or none, got {choice!r}{nearest(str(choice), ['checkpoint', 'none'])}"
        )
    return bool(choice == "checkpoint")


def _pop_architectures(composition: Composition) -> list[str]:
    """The architectures that a model option registers; the key is not an argument of its class."""
    model = composition.values.model
    with open_dict(model):
        names = model.pop(ARCHITECTURES, None)
    origin = composition.origins.pop(f"model.{ARCHITECTURES}", "config")
    names = OmegaConf.to_container(names) if OmegaConf.is_config(names) else names
    if names is not None and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        raise ConfigError(
            f"{origin}: model.{ARCHITECTURES}: expected a list of class names, got {names!r}"
        )
    return names or []


def _is_own_class(composition: Composition) -> bool:
    """Whether the model's class is not ours."""
    return composition.values.model.get("_target_") not in (SHIPPED_MODEL, TRANSFORMERS_MODEL)


def _fall_back(composition: Composition) -> None:
    """Replace the shipped decoder by transformers' code, where ours lacks the architecture or the
    user asks for it. A class that the user named stays."""
    from vllm_di.models.hf_config import is_native

    model, origins = composition.values.model, composition.origins
    wanted, architecture = model.get("implementation"), model.get("architecture")
    origin = origins.get("model._target_")
    typed = origin is not None and origin.by_user
    if typed or _is_own_class(composition):
        if wanted == "transformers" and model.get("_target_") != TRANSFORMERS_MODEL:
            place = place_of(origins, "model.implementation")
            raise ConfigError(
                f"{place}: model.implementation=transformers asks for transformers' code, but "
                f"{origin}: model._target_ is {model.get('_target_')}; leave one of them out"
            )
        return
    if wanted == "transformers":
        why = "implementation"
    elif wanted == "auto" and architecture and not is_native(architecture):
        why = f"{architecture} has no native model"
    else:
        return
    model._target_ = TRANSFORMERS_MODEL
    origins["model._target_"] = Origin("checkpoint", text=why)


def _is_chosen(composition: Composition, slot: str) -> bool:
    """Whether the user chose the slot's option, or set one of its keys on the command line."""
    if composition.choices[slot][1].chosen_by != "default":
        return True
    return any(
        key.startswith(f"{slot}.") and origin.by_user for key, origin in composition.origins.items()
    )


def _take(composition: Composition, key: str, value: Any) -> None:
    """Set one field from the checkpoint. Precedence: command line, then YAML (which must equal the
    checkpoint), then checkpoint."""
    _refuse_odd(composition, key, value)
    model, name = composition.values.model, f"model.{key}"
    if value is None or (key not in model and _is_own_class(composition)):
        return  # a class of somebody's own gets the keys that its node names
    if model.get(key) is None:
        OmegaConf.update(composition.values, name, value, force_add=True)
        composition.origins[name] = Origin("checkpoint", text=str(model.path))
        return
    ours = model[key]
    ours = OmegaConf.to_container(ours) if OmegaConf.is_config(ours) else ours
    origin = composition.origins.get(name)
    if ours != value and (origin is None or not origin.by_user):
        raise ConfigError(
            f"{origin or name}: model.{key} is {ours!r}, but the checkpoint {model.path} "
            f"has {value!r}; "
            f"use model=local for a checkpoint of another shape, or say which one holds: "
            f"model.{key}={value}"
        )


DEEPEST = 8
"""Nesting depth of lists and mappings in a checkpoint's config; published configs have three."""


def _refuse_odd(composition: Composition, key: str, value: Any, depth: int = 0) -> None:
    """Architecture values must be finite, and texts of a checkpoint must not interpolate our config
    (``${...}``). Raises CheckpointError."""
    if isinstance(value, Mapping | list) and depth < DEEPEST:
        for inner in value.values() if isinstance(value, Mapping) else value:
            _refuse_odd(composition, key, inner, depth + 1)
        return
    finite = not isinstance(value, float) or math.isfinite(value)
    if depth == DEEPEST or not finite or (isinstance(value, str) and "${" in value):
        raise CheckpointError(
            f"{composition.values.model.path}: config.json gives {key} the value "
            f"{reprlib.repr(value)}, which no model has"
        )
