"""The folders of config groups, looked at as files: which groups and options there are, and what
their comments say.

No Hydra here, so that ``--help`` and tab completion are quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import yaml

from vllm_di.containers.origins import YamlFile, read_yaml
from vllm_di.containers.ports import Port, conf_of_project, find_ports
from vllm_di.errors import ConfigError, PortError


class ConfigFiles:
    """The project's ``conf/``, those of ports, those of the user."""

    def __init__(self, roots: Sequence[Path], ports: Sequence[Port] = ()) -> None:
        self.roots = list(roots)
        self.ports = list(ports)
        self._files: dict[Path, YamlFile] = {}

    @classmethod
    def find(cls, config_dirs: Iterable[str | Path] = ()) -> Self:
        """The project's tree, every usable port's and the user's own folders."""
        ports = find_ports()
        own = []
        for folder in map(Path, config_dirs):
            if not folder.is_dir():
                raise ConfigError(f"--config-dir {folder}: no such folder")
            own.append(folder.resolve())
        tree = cls([conf_of_project(), *(p.conf for p in ports if p.conf), *own], ports)
        tree.refuse_duplicates()
        return tree

    def groups(self) -> list[str]:
        """All groups, in name order."""
        return sorted({d.name for r in self.roots for d in r.iterdir() if any(d.glob("*.yaml"))})

    def options(self, group: str) -> dict[str, Path]:
        """Option to file, in name order; ``base`` files hold what options share and are none."""
        files = {f.stem: f for r in reversed(self.roots) for f in (r / group).glob("*.yaml")}
        return {name: files[name] for name in sorted(files) if name != "base"}

    def read(self, path: Path) -> YamlFile:
        """A file's places and texts, read once. Raises ConfigError for one that is not YAML."""
        if path not in self._files:
            try:
                self._files[path] = read_yaml(path)
            except yaml.YAMLError as error:
                raise ConfigError(f"{shown(path)}: not valid YAML: {error}") from None
        return self._files[path]

    def port_of(self, path: Path) -> Port | None:
        """The port that a config file belongs to."""
        return next((p for p in self.ports if p.conf and path.is_relative_to(p.conf)), None)

    def refuse_duplicates(self) -> None:
        """One option, one owner: Hydra would take the first file and say nothing. The same holds of
        a platform's name."""
        for port in self.ports:
            ours = self.roots[0] / "platform" / f"{port.name}.yaml"
            if ours.is_file():
                raise PortError(
                    f"{port.distribution} is installed as port {port.name!r}, but "
                    f"platform={port.name} is defined in {shown(ours)}; uninstall it"
                )
        owners: dict[tuple[str, str], Path] = {}
        for root in self.roots:
            for file in root.glob("*/*.yaml"):
                key = (file.parent.name, file.stem)
                rival = owners.setdefault(key, file)
                if rival != file:
                    raise PortError(
                        f"option {key[0]}={key[1]} is defined twice: "
                        f"{shown(rival)} and {shown(file)}; "
                        "rename one"
                    )


def shown(path: Path) -> str:
    """A config file's name as messages show it: from ``conf/`` on for the project's own, else
    whole."""
    own = conf_of_project()
    return f"conf/{path.relative_to(own)}" if path.is_relative_to(own) else str(path)
