"""The wall between config and code: which class a node names, whether it may be built, and with
what arguments.

A class is built only when it is of this project, an enabled port or a trusted package *and*
implements the interface of its slot. Its constructor's signature is the schema of its node. All of
this happens before any weight is read.
"""

from __future__ import annotations

import collections.abc
import graphlib
import importlib
import inspect
import logging
import pkgutil
import sys
import typing
from abc import ABCMeta
from pathlib import Path
from typing import Any

import msgspec
from dependency_injector.containers import DeclarativeContainer

from vllm_di.components.interfaces import DEFAULT_ROLE, Executor
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.forms import misfit
from vllm_di.containers.manifest import literals
from vllm_di.containers.signatures import hint_of
from vllm_di.containers.slots import (
    DERIVED,
    GIVEN,
    SHARED,
    SLOTS,
    EngineContainer,
    slots,
)
from vllm_di.errors import ConfigError, PortError, VllmDiError, nearest, one_line

log = logging.getLogger(__name__)


class Part(msgspec.Struct):
    """One component, checked and ready to be built."""

    cls: type
    injected: list[str]
    """Names of slots, given and derived values that its constructor takes."""
    values: dict[str, Any]
    """Keyword arguments from the node."""
    parts: dict[str, Part]
    """Keyword arguments that are components themselves."""
    lazy: list[str] = []
    """Those of ``parts`` that the constructor takes as ``Callable[[], Interface]``: built when they
    are first called."""

    def needs(self) -> set[str]:
        """All names that this part and the parts within take from the container."""
        return set(self.injected).union(*(p.needs() for p in self.parts.values()))


class Plan(msgspec.Struct):
    """A whole container, checked: its parts and the order in which they are built."""

    parts: dict[str, Part]
    order: list[str]


def check(
    container: type[DeclarativeContainer],
    assembly: Assembly,
    *,
    stage: int = 0,
    replaced: typing.Collection[str] = (),
    only: typing.Collection[str] = (),
) -> Plan:
    """Check the slots of a container: all, or ``only`` some and what they need.

    Slots that are ``replaced`` by objects are not looked at. Raises ConfigError.
    """
    nodes, kinds = assembly.nodes(container, stage), slots(container)
    derived, shared = DERIVED.get(container, {}), SHARED.get(container, {})
    inspector = _Inspector(container, assembly)
    parts: dict[str, Part] = {}
    needs: dict[str, set[str]] = {}
    todo = list(only or kinds)
    while todo:
        slot = todo.pop()
        if slot in needs or slot in replaced:
            continue
        if slot in derived:
            needs[slot] = {derived[slot][0]}
        elif slot in kinds:
            path = assembly.path(container, slot, stage)
            parts[slot] = inspector.part(path, nodes[slot], kinds[slot])
            needs[slot] = parts[slot].needs()
        elif slot in shared:
            node = assembly.nodes(shared[slot])[slot]
            parts[slot] = inspector.part(slot, node, SLOTS[slot])
            needs[slot] = parts[slot].needs()
        else:
            raise ConfigError(f"opening {container.__name__} needs {slot}")
        todo.extend(sorted(needs[slot]))  # which error comes first must not depend on hashes
    if issubclass(getattr(parts.get("executor"), "cls", object), Executor):
        _check_roles(parts["executor"].cls, assembly)
    if container is EngineContainer and not only and {*kinds} <= {*parts}:
        _check_taken(parts, assembly)
    try:
        order = [s for s in graphlib.TopologicalSorter(needs).static_order() if s in needs]
    except graphlib.CycleError as error:
        cycle = list(reversed(error.args[1]))
        places = ", ".join(
            f"{s}: {assembly.place(assembly.path(container, s, stage) + '._target_')}"
            for s in cycle[1:]
        )
        raise ConfigError(
            f"the components need each other in a circle: {' -> '.join(cycle)} ({places})"
        ) from None
    return Plan(parts, order)


def taken(parts: typing.Mapping[str, Part]) -> set[str]:
    """The names that parts of a container take from it."""
    return set().union(*(part.needs() for part in parts.values()))


def _check_taken(parts: typing.Mapping[str, Part], assembly: Assembly) -> None:
    """Raise ConfigError for a slot of the engine that a person chose and no component takes."""
    by_user = {key.split(".")[0] for key, origin in assembly.origins.items() if origin.by_user}
    by_user |= {slot for slot, choice in assembly.choices.items() if choice.origin.by_user}
    for slot in sorted(by_user & {*parts} - taken(parts) - {"engine"}):
        choice = assembly.choices.get(slot)
        place = choice.origin if choice and choice.origin.by_user else assembly.place(slot)
        names = ", ".join(part.cls.__qualname__ for name, part in parts.items() if name != slot)
        raise ConfigError(
            f"{place}: {slot}: nothing here takes it, of {names}; leave it out, or "
            "choose a component that does"
        )


def _check_roles(executor: type[Executor], assembly: Assembly) -> None:
    """Raise ConfigError for workers of a role that the executor cannot run."""
    known = ", ".join(executor.known_roles)
    for role in assembly.workers:
        if role not in executor.known_roles:
            if role == DEFAULT_ROLE:
                raise ConfigError(
                    f"{assembly.choices['executor'].origin}: {executor.__qualname__} runs workers "
                    f"of the roles {known}, and platform={assembly.platform.name} names no roles; "
                    "take a platform whose file lists them under workers (docs/clusters.md)"
                )
            raise ConfigError(
                f"{assembly.place(f'workers.{role}')}: workers.{role}: {executor.__qualname__} "
                f"({assembly.place('executor._target_')}) runs no workers of the role {role!r}; "
                f"it knows {known}{nearest(role, executor.known_roles)}"
            )


def class_of(
    container: type[DeclarativeContainer], assembly: Assembly, slot: str, stage: int = 0
) -> type:
    """The class that fills a slot, checked against the slot's interface. Raises ConfigError."""
    return part_of(container, assembly, slot, stage).cls


def part_of(
    container: type[DeclarativeContainer], assembly: Assembly, slot: str, stage: int = 0
) -> Part:
    """What fills a slot, checked. Raises ConfigError."""
    path, node = assembly.path(container, slot, stage), assembly.nodes(container, stage)[slot]
    return _Inspector(container, assembly).part(path, node, slots(container)[slot])


def check_trusted(target: str, packages: list[str], place: str, slot: str) -> None:
    """Raise ConfigError for a ``_target_`` that names no class, or one outside ``packages``."""
    package, *rest = target.split(".")
    if package in packages and rest and all(part.isidentifier() for part in target.split(".")):
        return
    raise ConfigError(
        f"{place}: {slot}: {target!r} is refused: only classes of {', '.join(packages)} may fill a "
        "slot; enable another package with trust=[package]"
    )


def find_class(target: str, packages: list[str], place: str, slot: str) -> type:
    """Import the class that a ``_target_`` names. Nothing outside ``packages`` is imported. Raises
    ConfigError."""
    check_trusted(target, packages, place, slot)
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ConfigError(
                f"{place}: {slot}: there is no module {missing!r}{_nearest_module(missing)}"
            ) from None
        raise PortError(
            f"{place}: {slot}: {module_name} needs the package {missing!r}, which is not installed"
        ) from None
    except (Exception, SystemExit) as error:
        raise PortError(
            f"{place}: {slot}: {module_name} cannot be imported: {one_line(error)}"
        ) from error
    try:
        found = getattr(module, class_name, None)
    except Exception as error:  # a module may compute its attributes
        raise PortError(
            f"{place}: {slot}: {module_name} cannot give {class_name}: {one_line(error)}"
        ) from error
    if not isinstance(found, type):
        names = [
            n
            for n, v in vars(module).items()
            if isinstance(v, type) and v.__module__ == module_name
        ]
        raise ConfigError(
            f"{place}: {slot}: {module_name} has no class "
            f"{class_name!r}{nearest(class_name, names)}"
        )
    if found.__module__.split(".")[0] not in packages:
        raise ConfigError(
            f"{place}: {slot}: {target!r} is really {found.__module__}.{found.__qualname__}"
        )
    return found


def _nearest_module(name: str) -> str:
    """A hint at a module beside one that is not there; its package was imported."""
    parent, _, last = name.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    if folders is None:
        return ""
    names = [module.name for module in pkgutil.iter_modules(folders)]
    names += [f.name for folder in folders for f in Path(folder).glob("[a-z]*") if f.is_dir()]
    hint = nearest(last, names)
    return hint.replace("did you mean '", f"did you mean '{parent}.") if hint else ""


class _Inspector:
    def __init__(self, container: type[DeclarativeContainer], assembly: Assembly) -> None:
        self.assembly = assembly
        self.here = set(container.providers)
        self.elsewhere = {*SLOTS, *(g for names in GIVEN.values() for g in names)} - self.here
        self._hints: dict[tuple[str, str], Any] = {}
        """(module, annotation) to what it stands for."""

    def part(self, path: str, node: dict[str, Any], kind: type) -> Part:
        """Check the node at a dotted path against its class, and the class against the interface
        ``kind``."""
        target = node.get("_target_")
        place = self.assembly.place(f"{path}._target_")
        if not isinstance(target, str):
            raise ConfigError(
                f"{place}: {path}._target_: expected the dotted name of a class, got {target!r}"
            )
        cls = find_class(target, self.assembly.packages, place, path)
        try:
            self._implements(cls, kind, path, place)
            return self._arguments(path, node, cls)
        except VllmDiError:
            raise
        except Exception as error:
            raise PortError(
                f"{place}: {path}: the constructor of {target} cannot be read: {one_line(error)}"
            ) from error

    def _implements(self, cls: type, kind: type, path: str, place: str) -> None:
        wanted: frozenset[str] = getattr(kind, "__abstractmethods__", frozenset())
        if not issubclass(cls, kind):
            lacks = sorted(m for m in wanted if not hasattr(cls, m))
            detail = f"; it lacks {', '.join(lacks)}" if lacks else ""
            raise ConfigError(
                f"{place}: {path}: {cls.__module__}.{cls.__qualname__} does not implement "
                f"{kind.__name__}{detail}"
            )
        if inspect.isabstract(cls):
            lacks = sorted(getattr(cls, "__abstractmethods__", ()))
            raise ConfigError(
                f"{place}: {path}: {cls.__module__}.{cls.__qualname__} implements "
                f"{kind.__name__} only in part; "
                f"it lacks {', '.join(lacks)}"
            )
        if wrong := misfit(cls, kind):
            raise ConfigError(
                f"{place}: {path}: {wrong}; docs/interface-versions.md has what changed"
            )
        for name, member in vars(kind).items():
            instead = getattr(member, "__deprecated__", None)
            if instead and getattr(cls, name) is not member:
                log.warning(
                    "%s: %s: %s.%s is deprecated: %s", place, path, cls.__qualname__, name, instead
                )

    def _arguments(self, path: str, node: dict[str, Any], cls: type) -> Part:
        part = Part(cls, [], {}, {})
        keys = {k: v for k, v in node.items() if k != "_target_"}
        known: list[str] = []
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise ConfigError(
                    f"{path}: {cls.__qualname__} takes *{name}; a constructor must name what "
                    "it takes"
                )
            if name in self.here:
                part.injected.append(name)
            elif name in self.elsewhere:
                raise ConfigError(
                    f"{path}: {cls.__qualname__} asks for {name!r}, which is a slot of "
                    "another process's container"
                )
            elif name == "config" and isinstance(hint := self._hint(cls, parameter), type):
                fields = typing.cast(type[msgspec.Struct], hint).__struct_fields__
                given = {k: keys.pop(k) for k in list(keys) if k in fields}
                part.values[name] = self._convert(path, given, hint)
                known += fields
            else:
                known.append(name)
                if name in keys:
                    self._argument(
                        part, f"{path}.{name}", name, keys.pop(name), self._hint(cls, parameter)
                    )
                elif parameter.default is parameter.empty:
                    place = self.assembly.place(f"{path}._target_")
                    raise ConfigError(f"{place}: {path}.{name}: {cls.__qualname__} needs this key")
        for key in keys:
            place = self.assembly.place(f"{path}.{key}")
            has = f"has no such key; it has {', '.join(known)}" if known else "takes no keys"
            raise ConfigError(
                f"{place}: {path}.{key}: {cls.__qualname__} {has}{nearest(key, known)}"
            )
        return part

    def _argument(self, part: Part, path: str, name: str, value: Any, hint: Any) -> None:
        if isinstance(value, dict) and "_target_" in value:
            kinds = [k for k in (typing.get_args(hint) or (hint,)) if isinstance(k, ABCMeta)]
            if not kinds:
                raise ConfigError(
                    f"{self.assembly.place(path)}: {path}: a plain value is expected, not a "
                    "component"
                )
            part.parts[name] = self.part(path, value, kinds[0])
            if typing.get_origin(hint) is collections.abc.Callable:
                part.lazy.append(name)
        else:
            part.values[name] = self._convert(path, value, hint)

    def _hint(self, cls: type, parameter: inspect.Parameter) -> Any:
        return hint_of(cls, parameter, self._hints)

    def _convert(self, path: str, value: Any, hint: Any) -> Any:
        try:
            return msgspec.convert(value, _plain(hint))
        except msgspec.ValidationError as error:
            if node := _node_of(hint):
                raise ConfigError(
                    f"{self.assembly.place(path)}: {path}: expected {node}, got {value!r}"
                ) from None
            message, _, where = str(error).partition(" - at `$")
            path += where.rstrip("`")
            shown = value if not where else _dig(value, where.rstrip("`"))
            options = [] if where else literals(hint)
            choose = (
                f"; choose of {', '.join(options)}{nearest(str(shown), options)}" if options else ""
            )
            raise ConfigError(
                f"{self.assembly.place(path)}: {path}: {message} (the value is {shown!r}){choose}"
            ) from None


def _node_of(hint: Any) -> str:
    """What may stand where a component is expected; nothing where none is."""
    kinds = typing.get_args(hint) or (hint,)
    parts = [k.__name__ for k in kinds if isinstance(k, ABCMeta)]
    if not parts:
        return ""
    others = ["null"] if type(None) in kinds else []
    others += literals(hint)
    return f"a node of keys with the _target_ of a component ({' or '.join(parts)})" + "".join(
        f", or {other}" for other in others
    )


def _plain(hint: Any) -> Any:
    """The part of a union that plain data can have: ``OpLibrary | Literal["auto"]`` ->
    ``Literal["auto"]``."""
    kinds = typing.get_args(hint)
    if any(isinstance(k, ABCMeta) for k in kinds):
        rest = tuple(k for k in kinds if not isinstance(k, ABCMeta))
        return typing.Union[rest] if rest else None  # noqa: UP007 - built from a tuple
    return hint


def _dig(value: Any, where: str) -> Any:
    """The value at a msgspec path such as ``.rope_scaling.factor``; the whole when it has
    indices."""
    for key in where.strip(".").split("."):
        if not isinstance(value, dict) or key not in value:
            return value
        value = value[key]
    return value
