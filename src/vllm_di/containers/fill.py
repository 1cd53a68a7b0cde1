"""Fills a container: each slot gets a Singleton built from its node, or an object that the caller
hands in.

Whoever opens closes: every component that has ``close`` is closed when the ``with`` block ends, in
reverse order, all of them, even when one raises.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import msgspec
from dependency_injector.containers import DeclarativeContainer
from dependency_injector.providers import Object, Provider, Singleton

from vllm_di.components.interfaces import (
    Engine,
    Errand,
    NodeResource,
    OpLibrary,
    Placement,
    Worker,
    WorkerLauncher,
)
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.block_size import settle_block_size
from vllm_di.containers.faults import placed
from vllm_di.containers.replicas import PATH, refuse_alone
from vllm_di.containers.schema import Part, check, class_of
from vllm_di.containers.slots import DERIVED, SHARED, EngineContainer, WorkerContainer, slots
from vllm_di.containers.trial import try_out
from vllm_di.errors import ConfigError, PortError, VllmDiError, nearest, one_line

C = TypeVar("C", bound=DeclarativeContainer)


@contextmanager
def opened(
    container: type[C],
    assembly: Assembly,
    *,
    stage: int = 0,
    only: Collection[str] = (),
    preview: bool = False,
    **objects: Any,
) -> Iterator[C]:
    """A filled container. Keywords hand in the given values, and objects in place of components:

        with opened(WorkerContainer, assembly, placement=Placement(), attention=Fake()) as c:
            c.worker().load()

    ``only`` builds some slots and what they need. With ``preview`` a library of ops is built by its
    ``preview``: to be described, not to compute. Raises ConfigError before anything is built, and
    for an object that does not implement its slot's interface.
    """
    filled = container()
    _check_objects(container, objects)
    plan = check(container, assembly, stage=stage, replaced=objects.keys(), only=only)
    settle_block_size(plan, assembly, stage, objects)
    with ExitStack() as stack:
        providers: dict[str, Provider[Any]] = {n: Object(o) for n, o in objects.items()}
        for slot, part in plan.parts.items():
            shared = slot in SHARED.get(container, {})
            path = slot if shared else assembly.path(container, slot, stage)
            before = path.removesuffix(slot)
            providers[slot] = _provider(path, part, filled, assembly, stack, preview, before)
        for slot, (source, method) in DERIVED.get(container, {}).items():
            if slot not in objects:
                providers[slot] = Singleton(_call, filled.providers[source], method)
        filled.override_providers(**providers)
        stack.callback(_empty, filled)
        for slot in plan.order:
            filled.providers[slot]()
        yield filled


def _empty(filled: DeclarativeContainer) -> None:
    """Let go of the components. A container and its providers refer to each other: they would stay
    until the garbage collector comes, and the model's weights with them."""
    filled.reset_singletons()
    filled.reset_override()


def _check_objects(container: type[DeclarativeContainer], objects: dict[str, Any]) -> None:
    providers: dict[str, Any] = container.providers
    for name, value in objects.items():
        if name not in providers:
            raise ConfigError(
                f"{container.__name__} has no slot {name!r}{nearest(name, providers)}"
            )
        kind = providers[name].instance_of
        if not isinstance(value, kind):
            raise ConfigError(
                f"{name}: {type(value).__qualname__} does not implement {kind.__name__}"
            )


def _provider(
    path: str,
    part: Part,
    container: Any,
    assembly: Assembly,
    stack: ExitStack,
    preview: bool,
    before: str,
) -> Provider[Any]:
    arguments: dict[str, Any] = {name: container.providers[name] for name in part.injected}
    arguments |= {name: Object(value) for name, value in part.values.items()}
    built_once: list[tuple[Part, Provider[Any]]] = []
    for name, inner in part.parts.items():
        provider = next((known for same, known in built_once if same == inner), None)
        if provider is None:
            inside = f"{path}.{name}"
            provider = _provider(inside, inner, container, assembly, stack, preview, before)
            if issubclass(inner.cls, OpLibrary):  # ops.rms_norm=cpu beside ops=cpu: one library
                built_once.append((inner, provider))
        arguments[name] = Object(provider) if name in part.lazy else provider

    make: Callable[..., Any] = part.cls
    if preview and issubclass(part.cls, OpLibrary):
        make = part.cls.preview

    def build(**kwargs: Any) -> Any:
        try:
            built = make(**kwargs)
        except ConfigError as error:
            raise placed(error, assembly, path, before) from error
        except VllmDiError:
            raise
        except (Exception, SystemExit) as error:
            raise PortError(
                f"{assembly.place(path + '._target_')}: {path}: {part.cls.__module__}."
                f"{part.cls.__qualname__} cannot be built: {one_line(error)}"
            ) from error
        close: Callable[[], None] | None = getattr(built, "close", None)
        if close is not None:
            stack.callback(close)
        return built

    return Singleton(build, **arguments)


def _call(component: Any, method: str) -> Any:
    return getattr(component, method)()


class Launcher(WorkerLauncher):
    """Opens worker containers for an executor."""

    def __init__(
        self,
        assembly: Assembly,
        objects: Mapping[str, Any] | None = None,
        *,
        is_replacement: bool = False,
    ) -> None:
        """Raises ConfigError for an assembly of several engines that is not that of one."""
        refuse_alone(assembly.num_replicas, assembly.replica, assembly.place(PATH))
        self._assembly, self._objects = assembly, dict(objects or {})
        self.num_stages = len(assembly.stages)
        self.role, self.roles = assembly.role, tuple(assembly.workers)
        self.is_replacement = is_replacement

    def for_role(self, role: str) -> WorkerLauncher:
        assembly = self._assembly.of_role(role)
        return Launcher(assembly, self._objects, is_replacement=self.is_replacement)

    def open(self, placement: Placement) -> AbstractContextManager[Worker]:
        return open_worker(self._assembly, self._checked(placement), **self._objects)

    def worker_class(self, stage: int) -> type[Worker]:
        if (worker := self._objects.get("worker")) is not None:
            return type(worker)
        return class_of(WorkerContainer, self._assembly, "worker", stage)

    def place(self, stage: int, key: str) -> str:
        slot, _, rest = key.partition(".")
        path = slot
        if slot in slots(WorkerContainer):
            path = self._assembly.path(WorkerContainer, slot, stage)
        if not rest:
            return f"{self._assembly.place(f'{path}._target_')}: {path}"
        return f"{self._assembly.place(f'{path}.{rest}')}: {path}.{rest}"

    def command(self, placement: Placement, address: str) -> tuple[list[str], bytes]:
        placement = self._checked(placement)
        self._refuse_objects()
        where = msgspec.json.encode(placement).decode()
        module = "vllm_di.containers.worker_process"
        return [sys.executable, "-m", module, where, address], self._assembly.encode()

    def errand(self, placement: Placement) -> Errand:
        placement = self._checked(placement)
        self._refuse_objects()
        function = "vllm_di.containers.worker_process:run_on_node"
        return Errand(function, msgspec.json.encode(placement), self._assembly.encode())

    def resource(self, stage: int) -> NodeResource:
        key = f"{self._assembly.prefix(stage)}platform.ray.resource"
        name = self._assembly.platform_of(stage).ray.resource
        return NodeResource(name, f"{self._assembly.place(key)}: {key}")

    def _refuse_objects(self) -> None:
        if self._objects:
            raise ConfigError(
                f"objects cannot be handed to worker processes: {', '.join(self._objects)}; "
                "take executor=inline"
            )

    def _checked(self, placement: Placement) -> Placement:
        """With role and replica of this launcher. Raises ConfigError where stages would not
        run."""
        if placement.num_stages != self.num_stages:
            name, place = self._assembly.platform.name, self._assembly.place("executor._target_")
            raise ConfigError(
                f"{place}: executor: it runs a model in one piece, but platform={name} has "
                f"{self.num_stages} stages; take executor=pipeline"
            )
        return dataclasses.replace(
            placement,
            role=self.role,
            replica=self._assembly.replica or 0,
            num_replicas=self._assembly.num_replicas,
        )


@contextmanager
def open_worker(assembly: Assembly, placement: Placement, **objects: Any) -> Iterator[Worker]:
    """The worker of one rank or stage of a role, in this process. Raises ConfigError."""
    assembly = assembly.of_role(placement.role)
    with opened(
        WorkerContainer, assembly, stage=placement.stage, placement=placement, **objects
    ) as container:
        if not objects:
            try_out(container, assembly, placement.stage)
        yield container.worker()


@contextmanager
def open_engine(assembly: Assembly, **objects: Any) -> Iterator[Engine]:
    """The engine, with its workers started and their weights loaded."""
    launcher = objects.pop("launcher", None) or Launcher(assembly)
    with opened(EngineContainer, assembly, launcher=launcher, **objects) as container:
        yield container.engine()
