"""``vllm-di explain``: which class fills each slot, who chose it and where, and what else there
is."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import msgspec

from vllm_di.components.interfaces import INTERFACE_VERSION, OpTable, Placement
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.engine import (
    GIVEN,
    EngineContainer,
    ServerContainer,
    WorkerContainer,
    slots,
)
from vllm_di.containers.fill import opened
from vllm_di.containers.schema import check
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import ConfigError, nearest
from vllm_di.version import __version__


class Row(msgspec.Struct, frozen=True):
    """One slot."""

    container: str
    slot: str
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


class OpRow(msgspec.Struct, frozen=True):
    """One op: where it runs."""

    op: str
    runs_on: str


class Explanation(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    platform: str
    platform_reason: str
    level: str
    interface: str
    """Version of the interfaces of this engine."""
    announcement: str
    """The platform and its level as a start says them."""
    rows: list[Row]
    ops: list[OpRow]
    fusions: list[str]
    """Fused ops in force."""


def explain(
    assembly: Assembly, *, config_dirs: Iterable[str | Path] = (), ops: bool = True
) -> Explanation:
    """Check every slot of every container, then say what fills it. With ``ops`` the op table is
    built too.

    Raises ConfigError as the engine would at its start. Reads no weight.
    """
    tree = ConfigFiles.find(config_dirs)
    rows = []
    for container in (ServerContainer, EngineContainer, WorkerContainer):
        plan = check(container, assembly, replaced=GIVEN[container])
        for slot, kind in slots(container).items():
            cls = plan.parts[slot].cls
            target = f"{cls.__module__}.{cls.__qualname__}"
            package = target.split(".")[0]
            choice = assembly.choices[slot]
            own = assembly.origins.get(f"{slot}._target_")
            origin = (
                own if own and own.chosen_by in ("command line", "checkpoint") else choice.origin
            )
            rows.append(
                Row(
                    container=container.__name__,
                    slot=slot,
                    interface=kind.__name__,
                    option=choice.option,
                    target=target,
                    package=package,
                    version=_version(package),
                    chosen_by=origin.chosen_by,
                    place=str(origin),
                    alternatives=[o for o in tree.options(slot) if o != choice.option],
                )
            )
    platform = assembly.platform
    paths, fusions = _ops(assembly) if ops else ([], [])
    return Explanation(
        platform=platform.name,
        platform_reason=str(assembly.choices["platform"].origin),
        level=platform.level,
        interface=INTERFACE_VERSION,
        announcement=platform.announcement,
        rows=rows,
        ops=paths,
        fusions=fusions,
    )


def alternatives(slot: str, config_dirs: Iterable[str | Path] = ()) -> dict[str, str]:
    """Option to its one-line summary. Raises ConfigError for an unknown slot."""
    tree = ConfigFiles.find(config_dirs)
    groups = tree.groups()
    if slot not in groups:
        raise ConfigError(f"--slot: no slot {slot!r}{nearest(slot, groups)}")
    return {option: tree.read(path).summary for option, path in tree.options(slot).items()}


def _ops(assembly: Assembly) -> tuple[list[OpRow], list[str]]:
    with opened(WorkerContainer, assembly, only=["ops"], placement=Placement()) as container:
        table: OpTable = container.ops()
        paths = [OpRow(op, where) for op, where in table.describe().items()]
        return paths, sorted(getattr(table, "fusions", ()))


def _version(package: str) -> str:
    if package == "vllm_di":
        return __version__
    names = metadata.packages_distributions().get(package, [])
    return metadata.version(names[0]) if names else "?"
