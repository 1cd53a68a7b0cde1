"""What an executor and a worker process say to each other: calls of the methods that a worker
declares (``@remote``), and their answers.

A call is ``[name, argument, ...]``; its answer is ``Done`` with the result, ``Refused`` or
``Failure``. Both are typed by the method's signature and are decoded in one pass.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_di.components.remote import RemoteMethod, RemoteMethods
from vllm_di.components.transport import Codec, Failure


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A worker's first message: its container is filled."""

    rank: int
    stage: int = 0


class Close(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Close the container and exit."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The call was wrong; the worker is well and takes the next one. A Failure ends it."""

    failure: Failure


GREETING: Codec[Hello | Failure] = Codec(Hello | Failure)
"""What a worker process says before it is called."""


class Call:
    """A declared method as an executor calls it in another process."""

    def __init__(self, method: RemoteMethod) -> None:
        self.method = method
        self.codec: Codec[Any] = Codec(method.done | Refused | Failure)

    def frame(self, *args: Any) -> bytes:
        """The call as it is sent, to one worker or several. The arguments are not checked: the
        worker decodes them by their types."""
        return self.codec.frame(self.method.command(*args))

    def checked_frame(self, args: Sequence[Any]) -> bytes:
        """Raises RequestError with the wrong parameter's name."""
        return self.codec.frame(self.method.checked(args))

    def decode(self, payload: bytes) -> Any:
        """An answer. A result of another type than declared is a refusal, so that the answers of
        other workers to the same call are still read."""
        try:
            return self.codec.decode(payload)
        except msgspec.ValidationError as error:
            return Refused(Failure.of(self.method.broken(error)))


def result(answer: Any) -> Any:
    """What a call returned. Raises what the worker answered in its place."""
    if isinstance(answer, Failure):
        raise answer.error()
    if isinstance(answer, Refused):
        raise answer.failure.error()
    return answer.result


def commands(methods: RemoteMethods) -> Codec[Any]:
    """For a worker process: decodes the calls of all its methods, and Close. Raises PortError."""
    kinds = [method.command for method in methods]
    return Codec(typing.Union[Close, *kinds])
