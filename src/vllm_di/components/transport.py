"""Messages between processes: MessagePack in frames over Unix stream sockets. Nothing is ever
pickled.

A frame is a length of four bytes, little endian, and that many bytes of payload. The payload is a
msgspec struct of the conversation's union, so that a peer can send nothing but what the
conversation knows.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from vllm_di import errors
from vllm_di.errors import EngineDeadError

log = logging.getLogger(__name__)

MAX_FRAME = 1 << 30
_LENGTH = struct.Struct("<I")
T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes any struct, decodes the types of one side of a conversation."""

    def __init__(self, kind: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(kind)

    def frame(self, message: Any) -> bytes:
        """Raises ValueError for a message of more than MAX_FRAME bytes."""
        payload = self._encoder.encode(message)
        if len(payload) > MAX_FRAME:
            raise ValueError(f"a message of {len(payload)} bytes is above the limit of {MAX_FRAME}")
        return _LENGTH.pack(len(payload)) + payload

    def decode(self, payload: bytes) -> T:
        message: T = self._decoder.decode(payload)
        return message


class Connection(Generic[T]):
    """The blocking end of a conversation."""

    def __init__(self, sock: socket.socket, codec: Codec[T]) -> None:
        self.socket, self._codec = sock, codec

    def send(self, message: Any) -> None:
        """Raises OSError when the peer is gone."""
        self.socket.sendall(self._codec.frame(message))

    def send_frame(self, frame: bytes) -> None:
        """A frame that was made once for several peers."""
        self.socket.sendall(frame)

    def receive(self) -> T:
        """The next message. Raises EngineDeadError when the peer closed, TimeoutError on a
        timeout."""
        return self._codec.decode(self.receive_payload())

    def receive_payload(self) -> bytes:
        """The next message, not decoded. Raises as ``receive``."""
        size = _LENGTH.unpack(self._exactly(_LENGTH.size))[0]
        if size > MAX_FRAME:
            raise EngineDeadError(f"the peer announced a message of {size} bytes")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self.socket.recv(min(size - len(parts), 1 << 20))
            except ConnectionError as error:
                raise EngineDeadError(f"the connection was lost: {error}") from None
            if not part:
                raise EngineDeadError("the peer closed the connection")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        self.socket.close()


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """One payload. Raises asyncio.IncompleteReadError when the peer closed."""
    size = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
    if size > MAX_FRAME:
        raise EngineDeadError(f"the peer announced a message of {size} bytes")
    return await reader.readexactly(size)


class Rendezvous:
    """A listening Unix socket in a folder that the user alone can enter."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-di-")
        self.address = str(Path(self._folder.name) / "socket")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(self.address)
        Path(self.address).chmod(0o600)
        self.socket.listen()

    def accept(self) -> socket.socket | None:
        """The next connection; None for one that is not to be had."""
        return self.socket.accept()[0]

    def close(self) -> None:
        self.socket.close()
        self._folder.cleanup()


class GroupStore:
    """Where ranks find each other: a file in a folder that the user alone can enter. ``address`` is
    a ``Placement.rendezvous``."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-di-")
        self.address = f"file://{self._folder.name}/store"

    def close(self) -> None:
        self._folder.cleanup()


def connect(address: str) -> socket.socket:
    """The other end of a Rendezvous."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(address)
    return sock


class Failure(msgspec.Struct, tag=True, frozen=True):
    """An exception on its way to another process. One of ours arrives as the same class."""

    kind: str
    message: str
    key: str | None = None
    """Of a ConfigError."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The traceback of what is no user's error goes to this process's log, not to the peer."""
        if not isinstance(error, errors.VllmDiError):
            log.error("this process failed", exc_info=error)
        key = error.key if isinstance(error, errors.ConfigError) else None
        return cls(type(error).__name__, str(error) or type(error).__name__, key)

    def error(self) -> Exception:
        """The exception to raise on this side."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, errors.ConfigError):
            return kind(self.message, key=self.key)
        if isinstance(kind, type) and issubclass(kind, errors.VllmDiError):
            return kind(self.message)
        return EngineDeadError(f"{self.kind}: {self.message}")
