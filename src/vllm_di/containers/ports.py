"""Finds ports: packages that bring config groups and components for more hardware.

A port announces itself by one entry point in the group ``vllm_di.ports``, ``name = "package"``.
Entry points are read as text and the package is located without importing it: no code of a port
runs before a node of the config names it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path

import msgspec

from vllm_di.errors import PortError, one_line

GROUP = "vllm_di.ports"


class Port(msgspec.Struct, frozen=True):
    """One installed port. ``problem`` says why it cannot be used; its ``conf`` is None then."""

    name: str
    package: str
    distribution: str
    conf: Path | None
    problem: str | None = None


@functools.cache
def package() -> Path:
    """The folder of this package."""
    return Path(__file__).resolve().parents[1]


@functools.cache
def conf_of_project() -> Path:
    """The project's own ``conf/``: inside the package when installed from a wheel, else at the
    repository's top."""
    for folder in (package() / "conf", package().parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise PortError(f"conf/ is missing from this installation (looked in and above {package()})")


def find_ports(entry_points: Iterable[metadata.EntryPoint] | None = None) -> list[Port]:
    """All installed ports in name order. Of two packages with one name neither can be used: their
    ``problem`` names the other."""
    found: dict[str, Port] = {}
    for entry in _entry_points() if entry_points is None else entry_points:
        distribution = (entry.dist and entry.dist.name) or "an unknown distribution"
        port = _locate(entry.name, entry.value.split(":")[0].strip(), distribution)
        rival = found.get(port.name)
        if rival and rival.package != port.package:
            both = f"{rival.distribution} and {port.distribution}"
            port = Port(
                port.name, port.package, both, None, "two packages claim this name; uninstall one"
            )
        found[port.name] = port
    return [found[name] for name in sorted(found)]


def _entry_points() -> Iterable[metadata.EntryPoint]:
    """Those of our group; of every distribution that can be read, where one cannot."""
    try:
        return metadata.entry_points(group=GROUP)
    except Exception:  # somebody's entry_points.txt is damaged: the parser raises what it likes
        found: list[metadata.EntryPoint] = []
        for distribution in metadata.distributions():
            with contextlib.suppress(Exception):
                found += distribution.entry_points.select(group=GROUP)
        return found


def _locate(name: str, package: str, distribution: str) -> Port:
    try:
        spec = util.find_spec(package.split(".")[0])
    except Exception as error:  # a finder of somebody's may raise anything
        return Port(name, package, distribution, None, f"cannot be found: {one_line(error)}")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        return Port(name, package, distribution, None, f"package {package!r} is not importable")
    root = Path(places[0]).joinpath(*package.split(".")[1:])
    for conf in (root / "conf", root.parent / "conf", root.parent.parent / "conf"):
        if conf.is_dir() and any(conf.glob("*/*.yaml")):
            return Port(name, package, distribution, conf)
    return Port(name, package, distribution, None, f"has no conf/ folder in or beside {root}")
