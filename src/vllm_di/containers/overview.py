"""The assembly as people look at it: containers with their slots, for the server's page and for
``vllm-di explain --graph``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from vllm_di.components.interfaces import INTERFACE_VERSION
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.explain import Row, rows_as_named
from vllm_di.server.overview import ContainerView, Overview, SlotView

_WORD = re.compile(r"[\w./:@+-]*")


def overview(assembly: Assembly, config_dirs: Iterable[str | Path] = ()) -> Overview:
    """By the config alone: no component is imported."""
    return overview_of(assembly, rows_as_named(assembly, config_dirs))


def overview_of(assembly: Assembly, rows: Sequence[Row]) -> Overview:
    """``rows``: of all containers, those of one container together."""
    platform = assembly.choices["platform"].origin
    return Overview(
        model=str(assembly.settings["model_name"] or ""),
        platform=assembly.platform.name,
        platform_reason=_shown(platform.chosen_by, str(platform)),
        announcement=assembly.announcement,
        interface=INTERFACE_VERSION,
        replicas=assembly.num_replicas,
        containers=[
            ContainerView(name=name, part=part, slots=[_slot(row) for row in group])
            for (name, part), group in groupby(rows, _container)
        ],
    )


def _container(row: Row) -> tuple[str, str]:
    return row.container, row.slot.rpartition(".")[0]


def _slot(row: Row) -> SlotView:
    return SlotView(
        slot=row.slot.rpartition(".")[2],
        key=row.slot,
        interface=row.interface,
        option=row.option,
        target=row.target,
        chosen_by=row.chosen_by,
        place=_shown(row.chosen_by, row.place),
        alternatives=row.alternatives,
        missing=row.missing,
    )


def _shown(chosen_by: str, place: str) -> str:
    """A place without what an override holds beyond a word: that may be a secret."""
    head, equals, value = place.partition("=")
    if chosen_by == "auto" or not equals or _WORD.fullmatch(value):
        return place
    return f"{head}=…"
