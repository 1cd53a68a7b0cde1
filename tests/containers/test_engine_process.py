"""What the engine process does with what it is sent."""

from __future__ import annotations

import queue
import socket

import pytest

from vllm_di.components.transport import Codec, Connection
from vllm_di.containers.engine_process import Inbox, _read
from vllm_di.server import wire


def test_a_message_that_cannot_be_read_ends_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    """It would be deaf otherwise, and every request would wait for ever."""
    inbox: Inbox = queue.SimpleQueue()
    codec: Codec[wire.ToEngine] = Codec(wire.ToEngine)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(codec.frame(wire.Abort("r")) + codec.frame({"type": "Abort", "id": 1}))
        _read(Connection(ours, codec), inbox)
    assert inbox.get_nowait() == wire.Abort("r")
    assert inbox.get_nowait() is None
    assert "cannot be read" in caplog.text
