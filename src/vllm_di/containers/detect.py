"""``platform=auto``: reads what each platform's YAML says can be detected, without importing any
port."""

from __future__ import annotations

import glob
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_di.containers.manifest import Detect, read_detect
from vllm_di.containers.tree import shown
from vllm_di.errors import ConfigError, PortError

if TYPE_CHECKING:
    from vllm_di.containers.tree import ConfigFiles

FALLBACK = "cpu"


def detect_platform(tree: ConfigFiles) -> tuple[str, str]:
    """-> (platform option, reason). One accelerator wins, two are refused, none means ``cpu``.

    A platform's ``detect`` node names ``modules`` that must be installed and ``files`` (globs) that
    must exist; all must be there. One without conditions is never chosen by ``auto``.
    """
    broken = [p for p in tree.ports if p.problem]
    if broken:
        port = broken[0]
        raise PortError(
            f"platform=auto: port {port.name!r} (distribution {port.distribution}) "
            "is installed but "
            f"{port.problem}; mend or uninstall it, or name a platform, e.g. platform={FALLBACK}"
        )
    found: dict[str, str] = {}
    looked = []
    for option, path in tree.options("platform").items():
        wanted = _detect_node(path, tree)
        conditions = [*wanted.modules, *wanted.files]
        if not conditions:
            continue
        looked.append(option)
        installed = all(util.find_spec(m.split(".")[0]) for m in wanted.modules)
        if installed and all(map(glob.glob, wanted.files)):
            found[option] = ", ".join(conditions)
    if len(found) > 1:
        names = ", ".join(f"{option} ({why})" for option, why in found.items())
        raise ConfigError(
            f"platform=auto: several platforms are here: {names}; choose one with platform=NAME"
        )
    if found:
        option, why = next(iter(found.items()))
        return option, f"found {why}"
    names = f" (looked for: {', '.join(looked)})" if looked else ""
    return FALLBACK, f"no accelerator found{names}"


def _detect_node(path: Path, tree: ConfigFiles) -> Detect:
    """A platform's conditions, checked, from the YAML as it stands."""
    platform = tree.values(path).get("platform")
    node = platform.get("detect") if isinstance(platform, dict) else None
    lines = tree.read(path).lines
    return read_detect(node or {}, lambda key: f"{shown(path)}:{lines.get(key, 1)}")
