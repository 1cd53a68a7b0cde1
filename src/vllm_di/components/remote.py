"""Methods that may be called from another process: declared with ``@remote``, typed by their
annotations.

Arguments and results are plain data, checked against the annotations by msgspec. A method that is
not declared cannot be called, whatever the caller sends.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_di.errors import ConfigError, PortError, RequestError, nearest

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "__remote__"


def remote(method: F) -> F:
    """Declare that a method may be called from another process. Its parameters are positional.
    Each parameter and the result need an annotation that msgspec can decode: numbers, text, bytes,
    lists, mappings, dataclasses, ``msgspec.Struct``."""
    setattr(method, _MARK, True)
    return method


class RemoteMethod:
    """One declared method: its messages, made from its signature, and the checks of both."""

    command: type[msgspec.Struct]
    """A call: a field for each parameter. As MessagePack ``[name, argument, ...]``."""
    done: type[msgspec.Struct]
    """The answer: its field ``result``."""

    def __init__(self, owner: type, name: str, function: Callable[..., Any]) -> None:
        self.name, self._owner = name, owner.__qualname__
        signature = inspect.signature(function)
        self._signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        try:
            hints = _types(self._signature, function)
            self.command = msgspec.defstruct(
                name,
                [_field(p, hints[p.name]) for p in self._signature.parameters.values()],
                tag=name,
                array_like=True,
                forbid_unknown_fields=True,
                frozen=True,
            )
            self._result = hints["return"]
            self.done = msgspec.defstruct(
                "Done", [("result", self._result)], tag="Done", frozen=True
            )
        except (TypeError, NameError, ValueError) as error:
            raise PortError(
                f"{owner.__module__}.{self._owner}.{name} cannot be called from another process: "
                f"{error}"
            ) from None

    def checked(self, args: Sequence[Any]) -> Any:
        """The arguments as a ``command``. Raises RequestError with the wrong parameter's name."""
        try:
            self._signature.bind(*args)
        except TypeError as error:
            raise RequestError(f"{self._owner}.{self.name}{self._signature}: {error}") from None
        try:
            return msgspec.convert([self.name, *args], self.command)
        except msgspec.ValidationError as error:
            raise self.refusal(error) from None

    def refusal(self, error: msgspec.ValidationError) -> RequestError:
        """What is wrong with a call, with the parameter's name."""
        message, _, where = str(error).partition(" - at `$[")
        index, _, rest = where.rstrip("`").partition("]")
        names = list(self._signature.parameters)
        known = index.isdigit() and 0 < int(index) <= len(names)
        param = names[int(index) - 1] + rest if known else None
        at = f"{self.name}.{param}" if param else self.name
        return RequestError(f"{self._owner}.{at}: {message}", param=param)

    def checked_result(self, result: Any) -> Any:
        """Raises PortError for a result of another type than declared."""
        try:
            return msgspec.convert(result, self._result)
        except msgspec.ValidationError as error:
            raise self.broken(error) from None

    def broken(self, error: Exception) -> PortError:
        """What is wrong with a result."""
        return PortError(
            f"{self._owner}.{self.name} returned something else than it declares: {error}"
        )


class RemoteMethods:
    """The declared methods of a class, read once. A subclass may add its own. An override keeps the
    types of what it overrides: a caller may know the base class alone. Raises PortError for a
    method whose types cannot cross a process."""

    def __init__(self, cls: type) -> None:
        self._cls = cls
        declared: dict[str, Callable[..., Any]] = {}
        for base in reversed(cls.__mro__):
            for name, function in vars(base).items():
                if getattr(function, _MARK, False):
                    declared.setdefault(name, function)
        self._methods = {name: RemoteMethod(cls, name, f) for name, f in declared.items()}

    def __getitem__(self, name: str) -> RemoteMethod:
        """Raises ConfigError, with the declared methods, for any other name."""
        if (method := self._methods.get(name)) is None:
            raise ConfigError(
                f"{self._cls.__qualname__} declares no method {name!r}; it has "
                f"{', '.join(self._methods)}{nearest(name, self._methods)}"
            )
        return method

    def __contains__(self, name: str) -> bool:
        return name in self._methods

    def __iter__(self) -> Iterator[RemoteMethod]:
        return iter(self._methods.values())


def _field(parameter: inspect.Parameter, hint: Any) -> Any:
    if parameter.default is parameter.empty:
        return (parameter.name, hint)
    return (parameter.name, hint, parameter.default)


def _types(signature: inspect.Signature, function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter to type; ``return`` to the result's. Raises TypeError or NameError."""
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError(f"its parameter {parameter.name} is not positional")
        if parameter.name not in hints:
            raise TypeError(f"its parameter {parameter.name} has no annotation")
    if "return" not in hints:
        raise TypeError("its result has no annotation")
    for name, hint in hints.items():
        if foreign := _foreign(hint):
            what = "its result" if name == "return" else f"its parameter {name}"
            raise TypeError(f"{what} holds a {foreign}, which is not plain data")
    return hints


def _foreign(hint: Any) -> str:
    """The name of a type within that msgspec cannot decode by itself, or nothing."""
    pending, seen = [msgspec.inspect.type_info(hint)], set[int]()
    while pending:
        info = pending.pop()
        if isinstance(info, msgspec.inspect.CustomType):
            return info.cls.__qualname__
        if id(info) in seen:
            continue
        seen.add(id(info))
        for part in (getattr(info, name) for name in info.__struct_fields__):
            for item in part if isinstance(part, tuple) else (part,):
                if isinstance(item, msgspec.inspect.Field):
                    pending.append(item.type)
                elif isinstance(item, msgspec.inspect.Type):
                    pending.append(item)
    return ""
