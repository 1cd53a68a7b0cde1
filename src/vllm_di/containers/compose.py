"""The only module that knows Hydra: YAML groups and overrides in, one plain dict with the origin of
each value out.

Hydra is used through ``compose`` alone, under a lock (its global state is not thread-safe), with no
output folder, no logging and no change of directory.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vllm_di.components.interfaces import OpTable
from vllm_di.containers.defaults import check_defaults, check_file
from vllm_di.containers.keys import unknown_key
from vllm_di.containers.origins import Origin
from vllm_di.containers.overrides import read
from vllm_di.containers.tree import ConfigFiles, not_yaml, shown
from vllm_di.errors import ConfigError, PortError, nearest

_LOCK = threading.Lock()
_NODE = "node"
"""Where a single option is composed."""
_LEFT_OUT = [
    f"~hydra/{group}"
    for entry in HydraConf().defaults
    if isinstance(entry, dict)
    for group, option in entry.items()
    if option is not None
]
"""Groups of Hydra's own config, for programs that it starts: nobody reads them here, and to
compose them takes a quarter of the time."""


class Composition(msgspec.Struct):
    """A composed config: plain data, not yet resolved against a checkpoint nor checked."""

    values: DictConfig
    origins: dict[str, Origin]
    """Dotted key to where its value came from."""
    choices: dict[str, tuple[str, Origin]]
    """Group to its option and who chose it."""
    missing: dict[str, str] = {}
    """Slots that cannot be filled yet, and what to set for it."""


class ConfigTree(ConfigFiles):
    """Config groups that can be composed."""

    def compose(
        self, overrides: Sequence[str], sources: Mapping[str, Origin] | None = None
    ) -> Composition:
        """Compose ``config.yaml`` with Hydra-style overrides. ``sources`` says where an override
        stands that was not typed as it is. Raises ConfigError with the place of what is wrong."""
        override_sources = Sources(sources or {})
        parsed = [parse(text, override_sources) for text in overrides]
        for override in parsed:
            if override.key_or_group != "platform" or override.value() != "auto":
                self._check(override, override_sources)
        parsed, automatic = self._with_platform(parsed)
        check_defaults(self, _chosen(parsed, self.groups()))
        values, defaults = self._hydra([_text(o) for o in parsed], override_sources)
        choices = self._choices(parsed, defaults, automatic, override_sources)
        for group, (option, origin) in choices.items():
            try:
                self.refuse_clash(group, option)
            except PortError as error:
                raise PortError(f"{origin}: {error}") from None
        return Composition(values, self._origins(parsed, defaults, override_sources), choices)

    # -- overrides ---------------------------------------------------------------------------

    def _with_platform(self, parsed: list[Override]) -> tuple[list[Override], str | None]:
        """Replace ``platform=auto`` (or no platform) by the platform detected on this machine."""
        chosen = [o for o in parsed if o.key_or_group == "platform"]
        if chosen and chosen[-1].value() != "auto":
            return parsed, None
        from vllm_di.containers.detect import detect_platform

        option, reason = detect_platform(self)
        rest = [o for o in parsed if o.key_or_group != "platform"]
        return [*rest, OverridesParser.create().parse_override(f"platform={option}")], reason

    def _check(self, override: Override, sources: Sources) -> None:
        """Groups, options and first key parts, with the nearest valid name; Hydra checks the
        rest."""
        key, text = override.key_or_group, override.input_line or ""
        top = self.read(self.roots[0] / "config.yaml")
        groups = self.groups()
        if "." in key or override.package or key.startswith("hydra"):
            first = key.split(".")[0]
            if first not in groups and first not in top.lines:
                known = [*groups, *top.lines, "stages"]
                raise ConfigError(
                    f"{sources.place(text)}: no such group or key {first!r}{nearest(first, known)}"
                )
        elif key in groups:
            value, options = override.value(), self.options(key)
            if isinstance(value, dict) or override.is_delete():
                raise ConfigError(
                    f"{sources.place(text)}: {key!r} is a group; choose one of its options: "
                    f"{', '.join(options)}"
                )
            if str(value) not in options:
                raise ConfigError(
                    f"{sources.place(text)}: group {key!r} has no option {value!r}; it has "
                    f"{', '.join(options)}{_hint(key, str(value), options)}"
                    f"{self._broken_ports(str(value))}{_folder(key, str(value))}"
                )
        elif key not in top.lines:
            inside = " or ".join(map(repr, self._inside(key)))
            hint = f"; did you mean {inside}?" if inside else nearest(key, [*groups, *top.lines])
            raise ConfigError(f"{sources.place(text)}: no such group or key {key!r}{hint}")

    def _inside(self, key: str) -> list[str]:
        """Where groups have a key of this name: ``server.host`` for ``host``."""
        found = set()
        for group in self.groups():
            for path in self.options(group).values():
                with suppress(ConfigError):  # a port's file that is broken
                    found |= {
                        f"{group}.{known.name}"
                        for known in self.keys(path)
                        if "${" not in str(known.default)  # what follows another is set there
                    }
        return sorted(name for name in found if name.partition(".")[2] == key)

    def _broken_ports(self, value: str) -> str:
        port = next((p for p in self.ports if p.name == value and p.problem), None)
        return (
            f"; port {value!r} ({port.distribution}) is installed but {port.problem}"
            if port
            else ""
        )

    # -- composition -------------------------------------------------------------------------

    def _hydra(
        self, overrides: list[str], sources: Sources
    ) -> tuple[DictConfig, list[tuple[Path, str]]]:
        """-> (config, [(file, package)] in the order of merging)."""
        with _LOCK:
            GlobalHydra.instance().clear()
            try:
                with initialize_config_dir(str(self.roots[0]), version_base="1.3"):
                    texts = [*self._searched(), *map(_adding_op, overrides)]
                    values = hydra_compose("config", texts, return_hydra_config=True)
            except yaml.YAMLError as error:
                raise ConfigError(_not_yaml(error)) from None
            except (HydraException, OmegaConfBaseException) as error:
                raise self._explained(error, overrides, sources) from None
        choices = dict(values.hydra.runtime.choices)
        with open_dict(values):
            del values["hydra"]
        merged = list(self._merged(choices))
        self._add_ops(values.get("ops"), (file for file, _ in merged))
        return values, merged

    def compose_option(self, group: str, option: str) -> tuple[DictConfig, dict[str, Origin]]:
        """-> (an option's node with all that its defaults bring, where its keys stand: dotted from
        the node). Nothing in it is interpolated yet. Raises ConfigError."""
        self.refuse_clash(group, option)
        path = self._file(f"{group}/{option}")
        check_file(self, path)
        try:
            node = _plain_node(path) or self._hydra_node(group, option)
        except yaml.YAMLError as error:
            raise ConfigError(_not_yaml(error)) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"{shown(path)}: {' '.join(str(error).split())}") from None
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{shown(path)}: expected a mapping, got {node!r}")
        self._add_ops(node, self.with_included(path))
        origins: dict[str, Origin] = {}
        for file in reversed(self.with_included(path)):  # the nearest last: it wins
            place = shown(file)
            for key, line in self.read(file).lines.items():
                origins[key] = Origin(group, place, line)
        loose = OmegaConf.create(OmegaConf.to_container(node, resolve=False))  # not of Hydra's root
        assert isinstance(loose, DictConfig)
        return loose, origins

    def _hydra_node(self, group: str, option: str) -> Any:
        with _LOCK:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(self.roots[0]), version_base="1.3"):
                text = f"+{group}@{_NODE}={option}"
                return hydra_compose(None, [*self._searched(), text]).get(_NODE)

    def _add_ops(self, node: object, files: Iterable[Path]) -> None:
        """The keys that ``ops/base`` stands for, where it is among the files."""
        if isinstance(node, DictConfig) and any(map(self.has_ops, files)):
            with open_dict(node):
                for op in OpTable.OPS:
                    if op not in node:
                        node[op] = "auto"

    def _searched(self) -> list[str]:
        """The overrides that tell Hydra of the other trees, and to leave its own groups out."""
        extra = ",".join("'file://{}'".format(str(r).replace("'", r"\'")) for r in self.roots[1:])
        return [*([f"hydra.searchpath=[{extra}]"] if extra else []), *_LEFT_OUT]

    def _merged(self, choices: dict[str, str]) -> Iterator[tuple[Path, str]]:
        """(file, package) of everything that was merged: what is merged last comes last."""
        yield self.roots[0] / "config.yaml", ""
        paths = {
            group: self._file(f"{group}/{option}")
            for group, option in choices.items()
            if option is not None and not group.startswith("hydra")
        }
        for group, path in sorted(paths.items(), key=lambda item: item[0] == "platform"):
            file = self.read(path)
            for included in file.includes:
                yield self._file(f"{group}/{included}"), group
            yield path, "" if file.is_global else group

    def _file(self, name: str) -> Path:
        return next(f for r in self.roots if (f := r / f"{name}.yaml").is_file())

    def _explained(self, error: Exception, overrides: list[str], sources: Sources) -> ConfigError:
        """Hydra's words for an unknown key do not name the valid ones: find the override and name
        them."""
        plain, groups = [o for o in overrides if "." not in read(o).key], self.groups()
        with initialize_config_dir(str(self.roots[0]), version_base="1.3"):
            try:
                values = hydra_compose("config", [*self._searched(), *plain])
            except (HydraException, OmegaConfBaseException):
                values = OmegaConf.create({})
        for text in overrides:
            sign, key, _, value = read(text)
            if key not in groups and not sign.startswith("+") and key.split(".")[0] in values:
                names = _names(text)
                if why := unknown_key(values, key, value, names):
                    return ConfigError(f"{sources.place(text)}: {why}")
        return ConfigError(f"config: {' '.join(str(error).split())}")

    # -- origins -----------------------------------------------------------------------------

    def _origins(
        self, parsed: list[Override], files: list[tuple[Path, str]], sources: Sources
    ) -> dict[str, Origin]:
        origins: dict[str, Origin] = {}
        for file, package in files:
            prefix = f"{package}." if package else ""
            chooser, place = self._chooser(file), shown(file)
            for key, line in self.read(file).lines.items():
                origins[prefix + key] = Origin(chooser, place, line)
        for override in parsed:
            if "." in override.key_or_group or override.key_or_group not in self.groups():
                text = override.input_line or _text(override)
                for key in [k for k in origins if k.startswith(f"{override.key_or_group}.")]:
                    del origins[key]
                origins[override.key_or_group] = sources.origin(text)
        return origins

    def _choices(
        self,
        parsed: list[Override],
        files: list[tuple[Path, str]],
        automatic: str | None,
        sources: Sources,
    ) -> dict[str, tuple[str, Origin]]:
        """Who chose each group's option. Hydra lets the command line win, then the first
        ``override`` that it meets."""
        chosen: dict[str, tuple[str, Origin]] = {}
        for file, _ in files:
            if file.parent in self.roots:
                continue
            group, option = self.option_of(file)
            if option != "base":
                chosen[group] = (option, Origin("default"))
        by_user = {o.key_or_group: o for o in parsed}
        for group, (option, _) in list(chosen.items()):
            if group == "platform" and automatic is not None:
                chosen[group] = (option, Origin("auto", text=automatic))
            elif group in by_user:
                text = by_user[group].input_line or _text(by_user[group])
                chosen[group] = (option, sources.origin(text))
            else:
                for file, _ in reversed(files):
                    option_line = self.read(file).chooses.get(group)
                    if option_line and option_line[0] == option:
                        origin = Origin(self._chooser(file), shown(file), option_line[1])
                        chosen[group] = (option, origin)
                        break
        return chosen

    def _chooser(self, file: Path) -> str:
        return "default" if file.parent in self.roots else self.option_of(file)[0]


def _chosen(parsed: Iterable[Override], groups: Iterable[str]) -> dict[str, str]:
    """Group to the option that an override takes."""
    return {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in groups}


def _names(text: str) -> list[str]:
    """The keys of the mapping that an override gives; none of another value."""
    value = OverridesParser.create().parse_override(text).value()
    return [str(key) for key in value] if isinstance(value, dict) else []


def _not_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return not_yaml(Path(mark.name), error) if mark else " ".join(str(error).split())


def _plain_node(path: Path) -> DictConfig | None:
    """What Hydra makes of an option that builds on no other one: its file, read by OmegaConf. None
    for what needs Hydra."""
    if "@package" in path.read_text(encoding="utf-8"):
        return None
    node = OmegaConf.load(path)
    return node if isinstance(node, DictConfig) and "defaults" not in node else None


def _hint(group: str, value: str, options: Iterable[str]) -> str:
    """The nearest name. Names of hardware are short and look alike (hpu, cpu, npu): for a platform
    only a typing error gets a suggestion; any other name is told how to add a platform."""
    if group != "platform":
        return nearest(value, options)
    close = difflib.get_close_matches(value, options, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; another platform is a port: install its package, or start one with vllm-di new-port"


def _folder(group: str, value: str) -> str:
    """A hint for a user who gives an existing file or folder as if it were an option."""
    there = group == "model" and Path(value).exists()
    return f"; for the folder or file of this name: --model ./{value}" if there else ""


class Sources:
    """Where overrides stand: on the command line, unless it is said otherwise."""

    def __init__(self, known: Mapping[str, Origin]) -> None:
        self._known = known

    def origin(self, text: str) -> Origin:
        return self._known.get(text) or Origin("command line", text=text)

    def place(self, text: str) -> str:
        """For messages."""
        origin = self.origin(text)
        return f"{origin}: {text!r}" if origin.file else f"{origin.chosen_by}: {origin.text!r}"


def parse(text: str, sources: Sources) -> Override:
    """One override, parsed. Raises ConfigError."""
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
    except HydraException:
        sign, key, equals, value = read(text)
        if not equals:
            raise ConfigError(
                f"{sources.place(text)} is not an override; write key=value or group=option"
            ) from None
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        try:
            override = parser.parse_override(f"{sign}{key}='{quoted}'")
        except HydraException:
            raise ConfigError(f"{sources.place(text)}: {key!r} is not a key") from None
    if override.is_sweep_override():
        raise ConfigError(
            f"{sources.place(text)}: several values make a sweep, which only "
            "`bench -m` takes; "
            "put quotes around a value that holds a comma"
        )
    if override.package is not None:
        raise ConfigError(
            f"{sources.place(text)}: an option fills the slot of its group; leave the "
            f"@{override.package} out"
        )
    if not override.key_or_group:
        raise ConfigError(f"{sources.place(text)} is not an override; write key=value")
    override.input_line = text
    return override


def _adding_op(text: str) -> str:
    """Ops are declared in the code: Hydra, which knows the keys of YAML alone, adds theirs."""
    sign, key, _, _ = read(text)
    slot, _, op = key.partition(".")
    return f"++{text}" if slot == "ops" and op in OpTable.OPS and not sign else text


def _text(override: Override) -> str:
    """The override in Hydra's own grammar, with a value that was taken verbatim quoted."""
    line: str = override.input_line or ""
    try:
        OverridesParser.create().parse_override(line)
    except HydraException:
        sign, key, _, value = read(line)
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{sign}{key}='{quoted}'"
    return line
