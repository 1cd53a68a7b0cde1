"""Requests from the lines of a file, in OpenAI's batch form, through the server's own routes and
without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Annotated, Any, BinaryIO

import msgspec
import orjson
from starlette.types import ASGIApp, Message, Scope

from vllm_di.errors import nearest
from vllm_di.server.service import new_id


class BatchLine(msgspec.Struct, kw_only=True):
    """One request."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    method: str = "POST"
    url: str
    body: msgspec.Raw


class Reply(msgspec.Struct):
    """What the server answered."""

    status_code: int
    request_id: str
    body: Any


class LineError(msgspec.Struct):
    """Why the server was not asked."""

    code: str
    message: str


class BatchResult(msgspec.Struct, kw_only=True):
    """One line of the output: exactly one of ``response`` and ``error`` is there."""

    id: str
    custom_id: str | None
    response: Reply | None = None
    error: LineError | None = None

    @property
    def is_good(self) -> bool:
        return self.response is not None and self.response.status_code == 200


class Batch:
    """Asks for all lines of a file, several at a time."""

    def __init__(self, app: ASGIApp, urls: Collection[str], *, concurrency: int) -> None:
        """``urls``: those that a line may ask for."""
        self._app, self._urls, self._concurrency = app, urls, concurrency
        self._seen: dict[str, int] = {}

    async def run(self, lines: BinaryIO) -> AsyncIterator[BatchResult]:
        """The results, as they come. Empty lines are passed over. A file is read no faster than it
        is answered."""
        numbered = _numbered(lines)
        running: set[asyncio.Task[BatchResult]] = set()
        is_open = True
        try:
            while is_open or running:
                while is_open and len(running) < self._concurrency:
                    line = await asyncio.to_thread(next, numbered, None)
                    is_open = line is not None
                    if line is not None:
                        running.add(asyncio.create_task(self._result(*line)))
                if not running:
                    break
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _result(self, number: int, data: bytes) -> BatchResult:
        name = new_id("batch_req")
        try:
            line = msgspec.json.decode(data, type=BatchLine)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            wrong = LineError("invalid_line", f"line {number}: {error}")
            return BatchResult(id=name, custom_id=_custom_id(data), error=wrong)
        if (wrong_line := self._refused(line, number)) is not None:
            return BatchResult(id=name, custom_id=line.custom_id, error=wrong_line)
        status, headers, body = await ask(self._app, line.url, bytes(line.body))
        while (seconds := headers.get(b"retry-after")) is not None:  # a full queue, a new engine
            await asyncio.sleep(int(seconds))
            status, headers, body = await ask(self._app, line.url, bytes(line.body))
        request_id = headers.get(b"x-request-id", b"").decode()
        reply = Reply(status, request_id, orjson.loads(body))
        return BatchResult(id=name, custom_id=line.custom_id, response=reply)

    def _refused(self, line: BatchLine, number: int) -> LineError | None:
        first = self._seen.setdefault(line.custom_id, number)
        if first != number:
            text = f"line {number}: custom_id {line.custom_id!r} is that of line {first}"
            return LineError("duplicate_custom_id", text)
        if line.method != "POST" or line.url not in self._urls:
            return LineError(
                "invalid_url",
                f"line {number}: {line.method[:20]} {line.url[:200]}: expected POST and one of "
                f"{', '.join(self._urls)}{nearest(line.url[:200], self._urls)}",
            )
        if _streams(line.body):
            text = f"line {number}: stream=true has no place in a file"
            return LineError("invalid_request", text)
        return None


async def ask(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """One POST of JSON to an ASGI application -> status, headers, body."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "server": None,
        "client": None,
    }
    parts: list[bytes] = []
    head: dict[str, Any] = {}
    unread = [body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await asyncio.Event().wait()  # the client does not go away
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return head["status"], dict(head["headers"]), b"".join(parts)


def _numbered(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line


def _custom_id(data: bytes) -> str | None:
    """Of a line that is wrong otherwise."""
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return msgspec.json.decode(found["custom_id"], type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError):
        return None


def _streams(body: msgspec.Raw) -> bool:
    try:
        found = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False  # the server says what is wrong
    return bytes(found.get("stream", b"")) == b"true"
