"""The ``defaults`` lists of the files that take part in a composition, checked before Hydra reads
them: its own words have neither a line nor the nearest name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vllm_di.containers.origins import Default, YamlFile
from vllm_di.containers.tree import ConfigFiles, shown
from vllm_di.errors import ConfigError, nearest


def check_defaults(tree: ConfigFiles, chosen: dict[str, str]) -> None:
    """Check the list of ``config.yaml``, of what it names, and of what these name in turn.

    ``chosen``: group to the option that the user takes. Raises ConfigError with file and line, the
    choices and the nearest.
    """
    root = tree.read(tree.roots[0] / "config.yaml")
    taken = {group: option for group, (option, _) in root.chooses.items()}
    platform = tree.file("platform", chosen.get("platform", taken.get("platform", "")))
    if platform is not None:
        taken |= {group: option for group, (option, _) in tree.read(platform).chooses.items()}
    taken |= chosen
    files = [tree.file(group, option) for group, option in taken.items()]
    seen: set[Path] = set()
    for path in [root.path, platform, *files]:
        if path is not None:
            check_file(tree, path, taken, chosen, seen)


def check_file(
    tree: ConfigFiles,
    path: Path,
    composed: Iterable[str] = (),
    instead: Iterable[str] = (),
    seen: set[Path] | None = None,
) -> None:
    """Check one file's list, and those of the files that it builds on.

    ``composed``: groups that are filled already. ``instead``: groups whose option is the user's,
    whatever the file names.
    """
    seen = set() if seen is None else seen
    if path in seen:
        return
    seen.add(path)
    file = tree.read(path)
    for default in file.defaults:
        included = _included(tree, file, default, list(composed), list(instead))
        if included is not None:
            check_file(tree, included, composed, instead, seen)


def _included(
    tree: ConfigFiles, file: YamlFile, default: Default, composed: list[str], instead: list[str]
) -> Path | None:
    """The file that an entry names, where there is one to look at. Raises ConfigError."""
    place = f"{shown(file.path)}:{default.line}: defaults"
    if default.group is None and default.option is None:
        raise ConfigError(
            f"{place}: expected GROUP: OPTION, an option of this folder or _self_, got "
            f"{default.text}"
        )
    if default.option is None or default.is_optional or "${" in default.text:
        return None
    own = "" if file.path.parent in tree.roots else tree.option_of(file.path)[0]
    if default.group is None:
        if default.option == "_self_":
            return None
        group, options = own, list(tree.included(own))
    else:
        group, options = _group(tree, own, default, place), []
        options = list(tree.options(group))
        if group in instead:
            return None
        if default.is_override and group not in composed and composed:
            raise ConfigError(f"{place}: nothing fills {group!r} that could be overridden")
        if not default.is_override and file.is_global and not default.package and group in composed:
            raise ConfigError(
                f"{place}: {group} is filled already; write: override /{group}: {default.option}"
            )
        if group == "platform" and default.option == "auto":
            return None
    if default.option not in options:
        raise ConfigError(
            f"{place}: group {group!r} has no option {default.option!r}; it has "
            f"{', '.join(options)}{nearest(default.option, options)}"
        )
    return tree.file(group, default.option)


def _group(tree: ConfigFiles, own: str, default: Default, place: str) -> str:
    """The group that an entry names. Raises ConfigError."""
    assert default.group is not None
    groups, name = tree.groups(), default.group.lstrip("/")
    if own and not default.group.startswith("/"):  # relative to the file's own group
        if tree.options(f"{own}/{name}"):
            return f"{own}/{name}"
        hint = f"; write /{name}" if name in groups else nearest(name, groups)
        raise ConfigError(f"{place}: group {own!r} has no folder {name!r}{hint}")
    if name not in groups and not tree.options(name):
        raise ConfigError(f"{place}: no group {name!r}{nearest(name, groups)}")
    return name
