"""``vllm-di explain``: which class fills each slot, who chose it and where, and what else there
is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from dependency_injector.containers import DeclarativeContainer

from vllm_di.components.interfaces import INTERFACE_VERSION, OpTable, Placement
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.checkpoint import MISSING
from vllm_di.containers.fill import opened
from vllm_di.containers.replicas import PATH
from vllm_di.containers.schema import check
from vllm_di.containers.slots import (
    GIVEN,
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import ConfigError, PortError, nearest
from vllm_di.version import __version__


class Row(msgspec.Struct, frozen=True):
    """One slot."""

    container: str
    slot: str
    """On a platform with stages those of a worker stand as ``stages.1.attention``, of a role as
    ``decode.attention``."""
    interface: str
    option: str
    target: str
    """Dotted name of the class."""
    package: str
    version: str
    chosen_by: str
    """default, platform, model, command line, auto, checkpoint, or the group that overrode it."""
    place: str
    """File and line, the override as typed, or the reason of an automatic choice."""
    alternatives: list[str]
    missing: str | None = None
    """Why the slot cannot be filled here, and how to fix that."""


class OpRow(msgspec.Struct, frozen=True):
    """One op: where it runs."""

    op: str
    runs_on: str


class Explanation(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    platform: str
    platform_reason: str
    level: str
    """The level that its recorded reports prove."""
    claimed_level: str | None
    """The higher level that the manifest claims, if any."""
    interface: str
    """Version of the interfaces of this engine."""
    announcement: str
    """The platform and its level, as a start prints them."""
    rows: list[Row]
    ops: list[OpRow]
    """Empty where the op table cannot be built here: a row says why."""
    fusions: list[str]
    """Fused ops in force."""
    sampling: dict[str, int | float]
    """Values of sampling parameters for requests that set none."""
    sampling_place: str
    """Where they come from."""
    replicas: int = 1
    """Engines behind the API process, each with what the rows of engine and worker say."""
    replicas_place: str = ""
    """Where the number comes from."""
    nodes: list[str] = []
    """Where a cluster is to place workers: what each takes of a node, and who says so."""


def explain(
    assembly: Assembly, *, config_dirs: Iterable[str | Path] = (), ops: bool = True
) -> Explanation:
    """Check every slot of every container, then say what fills it. With ``ops`` the op table is
    asked too.

    Raises ConfigError as the engine would at its start, but what is absent (weights, a driver) is
    said in its row. Reads no weight, and compiles no kernel.
    """
    tree = ConfigFiles.find(config_dirs)
    rows = _rows(ServerContainer, assembly, tree) + _rows(EngineContainer, assembly, tree)
    paths: list[OpRow] = []
    fusions: list[str] = []
    for role in assembly.workers:
        view = assembly.of_role(role)
        for stage in range(len(view.stages)):
            rows += _rows(WorkerContainer, view, tree, stage)
            if not ops:
                continue
            try:
                table, fused = _ops(view, stage)
            except PortError as error:
                rows = _with_missing(rows, view, stage, str(error))
                continue
            paths += [OpRow(view.prefix(stage) + op, where) for op, where in table.items()]
            fusions += [view.prefix(stage) + op for op in fused]
    platform = assembly.platform
    return Explanation(
        platform=platform.name,
        platform_reason=str(assembly.choices["platform"].origin),
        level=platform.level,
        claimed_level=assembly.settings["claimed_level"],
        interface=INTERFACE_VERSION,
        announcement=assembly.announcement,
        rows=rows,
        ops=paths,
        fusions=fusions,
        sampling=assembly.settings["checkpoint"]["sampling"],
        sampling_place=assembly.place("generation_config"),
        replicas=assembly.num_replicas,
        replicas_place=assembly.place(PATH),
        nodes=_nodes(assembly),
    )


def _nodes(assembly: Assembly) -> list[str]:
    executor = assembly.engine["executor"]
    if "cluster" not in executor:
        return []
    lines = []
    for stage in range(len(assembly.stages)):
        before = assembly.prefix(stage)
        key, name = f"{before}platform.ray.resource", assembly.platform_of(stage).ray.resource
        if executor.get("resource") is not None:
            key, name = "executor.resource", executor["resource"]
        who = f"stage {stage}" if before else "each worker"
        amount = executor.get("amount", 1)
        lines.append(f"{who} takes {amount:g} {name} of a node ({assembly.place(key)})")
    bind = executor["cluster"]["bind"]
    return [*lines, f"workers connect to {bind} ({assembly.place('cluster.bind')})"]


def rows(
    assembly: Assembly, only: Collection[str], config_dirs: Iterable[str | Path] = ()
) -> list[Row]:
    """Those of some slots of the worker alone. Raises ConfigError."""
    return _rows(WorkerContainer, assembly, ConfigFiles.find(config_dirs), only=only)


def _rows(
    container: type[DeclarativeContainer],
    assembly: Assembly,
    tree: ConfigFiles,
    stage: int = 0,
    only: Collection[str] = (),
) -> list[Row]:
    paths = {slot: assembly.path(container, slot, stage) for slot in slots(container)}
    absent = [slot for slot, path in paths.items() if path in assembly.missing]
    plan = check(container, assembly, stage=stage, replaced=[*GIVEN[container], *absent], only=only)
    rows = []
    for slot, kind in slots(container).items():
        if only and slot not in only:
            continue
        node = assembly.nodes(container, stage)[slot]
        missing = assembly.missing.get(paths[slot]) or _waits_for(node)
        if slot in plan.parts:
            cls = plan.parts[slot].cls
            target = f"{cls.__module__}.{cls.__qualname__}"
        else:
            target = "" if node["_target_"] == missing else node["_target_"]
        rows.append(_row(container, assembly, tree, paths[slot], slot, kind, target, missing))
    return rows


def rows_as_named(assembly: Assembly, config_dirs: Iterable[str | Path] = ()) -> list[Row]:
    """Those of all containers by the config alone: ``target`` is the class as its node names it.
    Imports no component, so a process without torch can ask for the workers' too."""
    tree = ConfigFiles.find(config_dirs)
    views: list[tuple[type[DeclarativeContainer], Assembly, int]] = [
        (ServerContainer, assembly, 0),
        (EngineContainer, assembly, 0),
    ]
    for role in assembly.workers:
        view = assembly.of_role(role)
        views += [(WorkerContainer, view, stage) for stage in range(len(view.stages))]
    rows = []
    for container, view, stage in views:
        nodes = view.nodes(container, stage)
        for slot, kind in slots(container).items():
            path = view.path(container, slot, stage)
            missing = view.missing.get(path)
            target = nodes[slot]["_target_"]
            rows.append(_row(container, view, tree, path, slot, kind, target, missing))
    return rows


def _row(
    container: type[DeclarativeContainer],
    assembly: Assembly,
    tree: ConfigFiles,
    path: str,
    slot: str,
    kind: type,
    target: str,
    missing: str | None,
) -> Row:
    package = target.split(".")[0]
    choice = assembly.choices[path]
    own = assembly.origins.get(f"{path}._target_")
    origin = own if own and (own.by_user or own.chosen_by == "checkpoint") else choice.origin
    return Row(
        container=container.__name__,
        slot=path,
        interface=kind.__name__,
        option=choice.option,
        target=target,
        package=package,
        version=_version(package),
        chosen_by=origin.chosen_by,
        place=str(origin),
        alternatives=[o for o in tree.options(slot) if o != choice.option],
        missing=missing,
    )


def _waits_for(node: dict[str, Any]) -> str | None:
    """``MISSING``, where a value of the node waits for the checkpoint; else None."""
    return MISSING if MISSING in node.values() else None


def _with_missing(rows: list[Row], assembly: Assembly, stage: int, why: str) -> list[Row]:
    """The rows, with the reason why a stage's op table cannot be built in the row of its device or
    of its ops."""
    slot = "ops"
    try:
        with opened(WorkerContainer, assembly, stage=stage, only=["device"], placement=Placement()):
            pass
    except PortError:
        slot = "device"
    path = assembly.path(WorkerContainer, slot, stage)
    return [
        msgspec.structs.replace(r, missing=f"missing: {why}") if r.slot == path else r for r in rows
    ]


def alternatives(slot: str, config_dirs: Iterable[str | Path] = ()) -> dict[str, str]:
    """Option to its one-line summary. Raises ConfigError for an unknown slot."""
    tree = ConfigFiles.find(config_dirs)
    groups = tree.groups()
    if slot not in groups:
        raise ConfigError(f"--slot: no slot {slot!r}{nearest(slot, groups)}")
    return {option: tree.read(path).summary for option, path in tree.options(slot).items()}


def _ops(assembly: Assembly, stage: int) -> tuple[dict[str, str], list[str]]:
    """-> (op to where it runs, fused ops in force)."""
    with opened(
        WorkerContainer, assembly, stage=stage, only=["ops"], preview=True, placement=Placement()
    ) as container:
        table: OpTable = container.ops()
        return table.describe(), sorted(getattr(table, "fusions", ()))


def _version(package: str) -> str:
    if not package:
        return ""
    if package == "vllm_di":
        return __version__
    names = metadata.packages_distributions().get(package, [])
    return metadata.version(names[0]) if names else "?"
