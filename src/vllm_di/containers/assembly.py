"""The assembly: the composed config as plain data, one node for each slot. It is what crosses a
process boundary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from dependency_injector.containers import DeclarativeContainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vllm_di.components.interfaces import DEFAULT_ROLE
from vllm_di.containers.checkpoint import left_out, resolve_checkpoint
from vllm_di.containers.compose import Composition, ConfigTree
from vllm_di.containers.evidence import Recorded, read_recorded, shown_level
from vllm_di.containers.manifest import LEVELS, Level, Manifest, read_manifest
from vllm_di.containers.nested import resolve_nested
from vllm_di.containers.origins import Origin, place_of
from vllm_di.containers.overrides import repeated
from vllm_di.containers.registered import compose
from vllm_di.containers.replicas import PATH, take_num_replicas
from vllm_di.containers.slots import (
    SLOTS,
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)
from vllm_di.containers.stages import KEY, WORKERS, Stage, check_layers, prefix, split
from vllm_di.containers.tree import shown
from vllm_di.errors import ConfigError, nearest

SETTINGS = (
    "model_name",
    "trust",
    "generation_config",
    "checkpoint",
    "claimed_level",
    "cluster",
    "platform",
)
"""Top-level keys that are no slots."""


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
    num_replicas: int = 1
    """Engines behind one API process: ``executor.data_parallel_size``."""
    replica: int | None = None
    """The replica that this assembly is for; None where it is for all of them."""
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

    def of_replica(self, replica: int) -> Assembly:
        """The same assembly for one of the engines."""
        assert 0 <= replica < self.num_replicas
        return msgspec.structs.replace(self, replica=replica)

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
    def log_format(self) -> str:
        """``server.log_format``, for every process; a server of another class may have no such
        key, and a wrong value is found with the others."""
        return str(self.server["server"].get("log_format", "text"))

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
    num_replicas = take_num_replicas(values["executor"], whole.origins)
    assembly = Assembly(
        server={s: values[s] for s in slots(ServerContainer)},
        engine={s: values[s] for s in slots(EngineContainer)},
        workers={DEFAULT_ROLE: [{s: values[s] for s in slots(WorkerContainer)}]},
        settings={s: values.get(s) for s in SETTINGS},
        origins=dict(whole.origins),
        choices={group: Choice(*choice) for group, choice in whole.choices.items()},
        packages=["vllm_di", *_ports(tree), *_trusted(values.get("trust"))],
        warnings=[
            *repeated(overrides, sources or {}),
            *tree.warnings(),
            *unreadable,
            *left_out(values),
        ],
        missing=dict(whole.missing),
        num_replicas=num_replicas,
    )
    _check_cluster(assembly)
    if not parts.roles:
        return assembly
    return _add_workers(assembly, tree, whole, parts.roles, reports, incomplete)


def _check_cluster(assembly: Assembly) -> None:
    """Raise ConfigError where a person set a key of ``cluster`` that the executor does not take,
    and for replicas that would each start a cluster of their own."""
    cluster = assembly.engine["executor"].get("cluster")
    if cluster is not None:
        if assembly.num_replicas > 1 and not cluster.get("address"):
            raise ConfigError(
                f"{assembly.place(PATH)}: {PATH}={assembly.num_replicas}: without cluster.address "
                "each engine would start a cluster of its own, and all of them place workers on "
                "the same devices; `ray start --head` starts one that they share"
            )
        return
    for key, origin in assembly.origins.items():
        if key.split(".")[0] == "cluster" and origin.by_user:
            option = assembly.choices["executor"].option
            raise ConfigError(
                f"{origin}: {key}: executor={option} places no workers on a cluster; take "
                "executor=ray, or leave it out"
            )


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
                text = str(error)
                if not before or before not in text:  # else the override names its stage itself
                    text = f"{before.rstrip('.') or KEY}: {text}"
                raise type(error)(text) from None
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
    resolve_checkpoint(tree, composition, incomplete)
    resolve_nested(tree, composition)
    _lower_level(composition, reports)
    _check_targets(tree, composition)
    values = _plain(composition)
    known = [*SLOTS, *SETTINGS, KEY, WORKERS]
    for key in values:
        if key not in known:
            place = composition.origins.get(key, "config")
            raise ConfigError(
                f"{place}: {key!r} is neither a slot nor a setting{nearest(key, known)}"
            )
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


def _check_targets(tree: ConfigTree, composition: Composition) -> None:
    """Whether each slot has a class; before interpolations, which lead to it."""
    for slot in SLOTS:
        node = composition.values.get(slot)
        if isinstance(node, DictConfig) and node.get("_target_") is not None:
            continue
        option, origin = composition.choices[slot]
        path = tree.options(slot).get(option)
        place = shown(path) if path else str(origin)
        raise ConfigError(f"{place}: {slot}: it must be a mapping with a _target_, a class")


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
