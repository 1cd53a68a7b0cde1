"""The folders of config groups, looked at as files: which groups and options there are, and what
their comments say.

No Hydra here, so that ``--help`` and tab completion are quick.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import msgspec
import yaml

from vllm_di.components.interfaces import OpTable
from vllm_di.containers.origins import YamlFile, read_yaml
from vllm_di.containers.ports import Port, conf_of_project, find_ports, package
from vllm_di.errors import ConfigError, PortError, one_line


class Key(msgspec.Struct, frozen=True):
    """One key of an option, as ``help`` and the reference show it."""

    name: str
    """Dotted, within the file: ``library.isa``."""
    default: Any
    """As the YAML has it: nothing interpolated."""
    text: str
    """The comment behind it, or behind the mapping in which it stands."""
    file: Path
    """The one that has the default: the option's own, or one that it builds on."""


class ConfigFiles:
    """The project's ``conf/``, those of ports, those of the user."""

    def __init__(self, roots: Sequence[Path], ports: Sequence[Port] = ()) -> None:
        self.roots = list(roots)
        self.ports = list(ports)
        self._files: dict[Path, YamlFile] = {}
        self._options: dict[str, dict[str, Path]] = {}

    @classmethod
    def find(cls, config_dirs: Iterable[str | Path] = ()) -> Self:
        """The project's tree, every usable port's and the user's own folders."""
        ports = find_ports()
        own = []
        for folder in map(Path, config_dirs):
            if not folder.is_dir():
                raise ConfigError(f"--config-dir {folder}: no such folder")
            own.append(folder.resolve())
        return cls([conf_of_project(), *(p.conf for p in ports if p.conf), *own], ports)

    def groups(self) -> list[str]:
        """All groups, in name order; looked up once."""
        return list(self._groups)

    @cached_property
    def _groups(self) -> list[str]:
        return sorted({file.parent.name for r in self.roots for file in r.glob("*/*.yaml")})

    def options(self, group: str) -> dict[str, Path]:
        """Option to file, in name order, looked up once; one in a folder of the group is
        ``FOLDER/OPTION``. ``base`` files are shared parts, no options."""
        if group not in self._options:
            files: dict[str, Path] = {}
            for root in reversed(self.roots):
                files |= {self.option_of(f)[1]: f for f in (root / group).rglob("*.yaml")}
            self._options[group] = {n: files[n] for n in sorted(files) if n != "base"}
        return self._options[group].copy()

    def read(self, path: Path) -> YamlFile:
        """A file's places and texts, read once. Raises ConfigError for one that is not YAML."""
        if path not in self._files:
            try:
                file = read_yaml(path)
                self._files[path] = _with_ops(file) if self.has_ops(path) else file
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(not_yaml(path, error)) from None
            except OSError as error:
                raise ConfigError(f"{shown(path)}: {one_line(error)}") from None
        return self._files[path]

    def values(self, path: Path) -> dict[str, Any]:
        """The raw content of a file: not composed, nothing interpolated. Raises ConfigError."""
        self.read(path)
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict):
            raise ConfigError(f"{shown(path)}: expected a mapping, got {content!r}")
        return dict.fromkeys(OpTable.OPS, "auto") | content if self.has_ops(path) else content

    def has_ops(self, path: Path) -> bool:
        """Whether it is the file that stands for the declared ops: each is a key of it, and
        ``auto``."""
        return path == self.roots[0] / "ops/base.yaml"

    def included(self, group: str) -> dict[str, Path]:
        """As ``options``, with ``base`` files, which options include."""
        found = (f for root in reversed(self.roots) for f in (root / group).glob("*.yaml"))
        return dict(sorted((f.stem, f) for f in found))

    def file(self, group: str, option: str) -> Path | None:
        """The file that Hydra takes for an option, or for what options include: the first."""
        files = (root / group / f"{option}.yaml" for root in self.roots)
        return next((file for file in files if file.is_file()), None)

    def option_of(self, path: Path) -> tuple[str, str]:
        """(group, option) of an option's file."""
        root = next(root for root in self.roots if path.is_relative_to(root))
        group, _, option = path.relative_to(root).with_suffix("").as_posix().partition("/")
        return group, option

    def with_included(self, path: Path) -> list[Path]:
        """An option's file and those that it builds on, wherever they lie; the nearest first.
        Raises ConfigError for one that is not there."""
        files = [path]
        for name in self.read(path).includes:
            included = self.file(path.parent.name, name)
            if included is None:
                raise ConfigError(f"{shown(path)}: defaults: there is no {path.parent.name}/{name}")
            if included not in files:
                files += [f for f in self.with_included(included) if f not in files]
        return files

    def keys(self, path: Path) -> list[Key]:
        """The keys of an option's file and of those that it builds on, each once: the nearest
        default, and the nearest comment. Raises ConfigError."""
        sources = [(self.read(file), self.values(file)) for file in self.with_included(path)]
        names = dict.fromkeys(key for file, _ in sources for key in file.lines)
        found = []
        for name in names:
            if name.endswith("_target_") or name.split(".")[0] == "defaults":
                continue
            file, content = next((f, c) for f, c in sources if name in f.lines)
            default: Any = content
            for part in name.split("."):
                default = default.get(part) if isinstance(default, dict) else None
            if isinstance(default, dict) and default:
                continue  # its keys are listed
            found.append(Key(name, default, _text(name, [f for f, _ in sources]), file.path))
        return found

    def port_of(self, path: Path) -> Port | None:
        """The port that a config file belongs to."""
        return next((p for p in self.ports if p.conf and path.is_relative_to(p.conf)), None)

    def refuse_clash(self, group: str, option: str) -> None:
        """Raise PortError for an option that has two owners."""
        if text := self.clashes.get((group, option)):
            raise PortError(text)

    @cached_property
    def clashes(self) -> dict[tuple[str, str], str]:
        """(group, option) to the reason why it cannot be used. An option has one owner: of two
        files Hydra would silently take the first. The same holds for the name of a platform, and
        for files that an option includes."""
        clashes: dict[tuple[str, str], str] = {}
        owners: dict[tuple[str, str], Path] = {}
        for root in self.roots:
            for file in sorted(root.glob("*/*.yaml")):
                key = (file.parent.name, file.stem)
                rival = owners.setdefault(key, file)
                if rival == file:
                    continue
                text = (
                    f"option {key[0]}={key[1]} is defined twice: {shown(rival)} and {shown(file)}; "
                    "rename one"
                )
                if key[1] != "base":
                    clashes[key] = text
                clashes |= {(key[0], name): text for name in self._including(file)}
        for port in self.ports:
            ours = self.roots[0] / "platform" / f"{port.name}.yaml"
            if ours.is_file():
                clashes["platform", port.name] = (
                    f"{port.distribution} is installed as port {port.name!r}, but "
                    f"platform={port.name} is defined in {shown(ours)}; uninstall it"
                )
        return clashes

    def _including(self, file: Path) -> list[str]:
        """Options of a file's own folder that build on it."""
        options = []
        for other in file.parent.glob("*.yaml"):
            with contextlib.suppress(ConfigError):  # reported where the option is asked for
                if file.stem in self.read(other).includes:
                    options.append(other.stem)
        return options

    def warnings(self) -> list[str]:
        """Problems of ports, a line each: they become errors only where their options are asked
        for."""
        broken = [
            f"port {port.name!r} ({port.distribution}) cannot be used: {port.problem}"
            for port in self.ports
            if port.problem
        ]
        return [*broken, *dict.fromkeys(self.clashes.values())]


def _text(key: str, files: Sequence[YamlFile]) -> str:
    """The nearest comment behind a key, or behind the mapping in which it stands."""
    while key:
        if text := next((file.texts[key] for file in files if key in file.texts), ""):
            return text
        key = key.rpartition(".")[0]
    return ""


def _with_ops(file: YamlFile) -> YamlFile:
    """With a key for each declared op, and its text."""
    lines = dict.fromkeys(OpTable.OPS, 1)
    texts = {op: declared.text for op, declared in OpTable.OPS.items()}
    return msgspec.structs.replace(file, lines=lines | file.lines, texts=texts | file.texts)


def not_yaml(path: Path, error: Exception) -> str:
    """What is wrong with a file that is not YAML, with its line where the parser names one."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{shown(path)}: not valid YAML: {one_line(error)}"
    return f"{shown(path)}:{mark.line + 1}: not valid YAML: {getattr(error, 'problem', error)}"


def shown(path: Path) -> str:
    """A config file's name as messages show it: from ``conf/`` on for the project's own, from the
    package on for one within, else whole."""
    own, here = conf_of_project(), package()
    if path.is_relative_to(own):
        return f"conf/{path.relative_to(own)}"
    return str(path.relative_to(here.parent) if path.is_relative_to(here) else path)
