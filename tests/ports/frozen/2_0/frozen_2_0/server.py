"""Slots of the API process: text in, text out, over as little HTTP as serves a client."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from vllm_di.components.interfaces import (
    ChatTemplate,
    EngineClient,
    Metrics,
    ParserRequest,
    ReasoningParser,
    ReplicaLoad,
    RequestTimes,
    Router,
    Server,
    Tokenizer,
    ToolParser,
    TracedRequest,
    Tracing,
)
from vllm_di.components.messages import (
    EngineRequest,
    EngineStats,
    SamplingParams,
    WorkerReport,
)
from vllm_di.errors import EngineDeadError, RequestError

MOST_BYTES = 1 << 20
"""Of a request's head and of its body."""


class FrozenTokenizer(Tokenizer):
    """A token for each byte; 256 begins a text and 257 ends one."""

    eos_token_id = 257
    bos_token, eos_token = "<s>", "</s>"

    def __init__(self, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*([256] if add_special_tokens else []), *text.encode("utf-8", "replace")]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = (i for i in token_ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def token_bytes(self, token_id: int) -> bytes:
        names = {256: "<s>", 257: "</s>"}
        if token_id < 256:
            return bytes([token_id])
        return names.get(token_id, f"⟨{token_id}⟩").encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in (256, 257)


class FrozenChatTemplate(ChatTemplate):
    """A line for each message."""

    def __init__(self) -> None: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        if continue_final_message:
            return "\n".join(lines)
        return "\n".join([*lines, "assistant:"] if add_generation_prompt else [*lines, ""])


class FrozenToolParser(ToolParser):
    """No tools."""

    def __init__(self) -> None: ...

    def check(self, request: Mapping[str, Any]) -> None:
        if request.get("tools"):
            raise RequestError(
                "tools are not available here", param="tools", code="unsupported_parameter"
            )

    def start(self, request: ParserRequest) -> None:
        """All text is content."""


class FrozenReasoningParser(ReasoningParser):
    """No reasoning apart from the answer."""

    def __init__(self) -> None: ...

    def check(self, request: Mapping[str, Any]) -> None: ...

    def start(self, request: ParserRequest) -> None:
        """All text is content."""


class FrozenRouter(Router):
    """The replica with the fewest requests."""

    def __init__(self) -> None: ...

    def choose(self, request: EngineRequest, loads: Sequence[ReplicaLoad]) -> int:
        return min(loads, key=lambda load: load.num_requests).replica


class FrozenTracing(Tracing):
    """Counts requests by status."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}

    def record(self, request: TracedRequest) -> None:
        self.statuses[request.status] = self.statuses.get(request.status, 0) + 1


class FrozenMetrics(Metrics):
    """Four counters and two gauges."""

    def __init__(self) -> None:
        self._values = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "finished", "http", "running", "waiting"), 0
        )

    def tokens(
        self,
        num_prompt: int,
        num_generated: int,
        first_after: float | None,
        inter_token: float | None,
    ) -> None:
        self._values["prompt_tokens"] += num_prompt
        self._values["generated_tokens"] += num_generated

    def finished(self, times: RequestTimes) -> None:
        self._values["finished"] += 1

    def engine(self, stats: EngineStats) -> None:
        self._values |= {"running": stats.num_running, "waiting": stats.num_waiting}

    def http(self, handler: str, status: int, seconds: float) -> None:
        self._values["http"] += 1

    def info(self, report: WorkerReport, labels: Mapping[str, str]) -> None: ...

    def render(self) -> tuple[bytes, str]:
        lines = [f"frozen_2_0_{name} {value}\n" for name, value in self._values.items()]
        return "".join(lines).encode(), "text/plain; version=0.0.4"


class FrozenServer(Server):
    """GET /health, /metrics and /v1/models; POST /v1/completions and /v1/chat/completions, one
    answer each, whole. A connection serves one request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        tool_parser: ToolParser,
        reasoning_parser: ReasoningParser,
        metrics: Metrics,
        engine_client: EngineClient,
        *,
        host: str,
        port: int,
        model_name: str,
    ) -> None:
        self._tokenizer, self._template = tokenizer, chat_template
        self._parsers = (tool_parser, reasoning_parser)
        self._metrics, self._engine, self._model = metrics, engine_client, model_name
        self._host, self._port = host, port
        engine_client.on_stats = metrics.engine
        self._numbers = itertools.count()

    async def run(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        server = await asyncio.start_server(self._serve, self._host, self._port, limit=MOST_BYTES)
        watching = [asyncio.create_task(stop.wait()), asyncio.create_task(self._watch())]
        try:
            await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            server.close()  # those in flight go on: wait_closed waits for them
            await server.wait_closed()
            for task in watching:
                task.cancel()
            results = await asyncio.gather(*watching, return_exceptions=True)
        for error in results:
            if isinstance(error, EngineDeadError):
                raise error

    async def _watch(self) -> None:
        await self._engine.wait_ready()
        await self._engine.wait_dead()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began, path, status, kind = time.monotonic(), "", 200, "application/json"
        body: Any
        try:
            path, fields = await _request(reader)
            body = await self._answer(path, fields)
            if isinstance(body, tuple):
                body, kind = body
        except RequestError as error:
            status = error.status
            body = {"error": {"message": str(error), "param": error.param, "code": error.code}}
        except EngineDeadError as error:
            status, body = 503, {"error": {"message": str(error)}}
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            status, body = 400, {"error": {"message": "the request is cut off, or too long"}}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + data)
        self._metrics.http(path, status, time.monotonic() - began)
        try:
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            return  # the client is gone

    async def _answer(self, path: str, fields: dict[str, Any] | None) -> Any:
        if path == "/metrics":
            return self._metrics.render()
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": self._model, "object": "model"}]}
        if path == "/health":
            if self._engine.state != "ready":
                raise RequestError(f"the engine is {self._engine.state}", status=503)
            return {}
        if path not in ("/v1/completions", "/v1/chat/completions"):
            raise RequestError("no such page", status=404)
        if fields is None:
            raise RequestError("use POST", status=405)
        chat = path == "/v1/chat/completions"
        for parser in self._parsers:
            parser.check(fields)
        ids, params = self._read(fields, chat=chat)
        return await self._generate(ids, params, chat=chat)

    def _read(self, fields: dict[str, Any], *, chat: bool) -> tuple[list[int], SamplingParams]:
        given = dict(fields)
        if given.pop("model", self._model) != self._model:
            raise RequestError("no such model", param="model", status=404)
        source = given.pop("messages" if chat else "prompt", None)
        try:
            if not chat:
                text = source
            else:
                text = self._template.render(source or [])
            ids = self._tokenizer.encode(text) if isinstance(text, str) else [*map(int, text)]
            params = SamplingParams(**given)
        except (TypeError, KeyError, ValueError) as error:  # a RequestError is one, with its field
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"a field is missing, unknown or wrong: {error}") from None
        if params.n != 1 or params.bad_words or params.logprobs is not None:
            raise RequestError("n, bad_words and logprobs are not available here")
        return ids, params

    async def _generate(
        self, ids: list[int], params: SamplingParams, *, chat: bool
    ) -> dict[str, Any]:
        began, name = time.monotonic(), f"frozen-{next(self._numbers)}"
        request = EngineRequest(
            request_id=name, prompt_token_ids=ids, params=params, arrival_time=time.time()
        )
        tokens: list[int] = []
        text, reason, queue = "", "stop", 0.0
        outputs = self._engine.generate(request)
        async for output in outputs:
            if output.error is not None:
                raise RequestError(
                    output.error,
                    param=output.error_param,
                    code=output.error_code,
                    status=output.error_status,
                )
            first = time.monotonic() - began if not tokens else None
            self._metrics.tokens(0 if tokens else len(ids), len(output.token_ids), first, None)
            tokens += output.token_ids
            queue += output.queue_time
            stopped = output.finish_reason == "stop"
            kept = tokens[:-1] if stopped and output.stop_reason is None else tokens
            text = self._tokenizer.decode(kept, skip_special_tokens=params.skip_special_tokens)
            ends = [text.find(stop) for stop in params.stop if stop in text]
            if ends:
                text, reason = text[: min(ends)], "stop"
                break
            reason = output.finish_reason or reason
        seconds = time.monotonic() - began
        self._metrics.finished(
            RequestTimes(
                finish_reason=reason,
                num_prompt_tokens=len(ids),
                num_generated_tokens=len(tokens),
                max_tokens=params.max_tokens,
                n=1,
                end_to_end=seconds,
                queue=queue,
                prefill=0.0,
                decode=seconds - queue,
            )
        )
        content: dict[str, Any] = {"text": text}
        if chat:
            content = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, "finish_reason": reason, "token_ids": tokens, **content}
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": len(tokens),
            "total_tokens": len(ids) + len(tokens),
        }
        return {
            "id": name,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": [choice],
            "usage": usage,
        }


async def _request(reader: asyncio.StreamReader) -> tuple[str, dict[str, Any] | None]:
    """-> the path, and the fields of a POST's JSON. Raises RequestError."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = head[0].split()
    if len(words) != 3 or words[0] not in ("GET", "POST"):
        raise RequestError("expected GET or POST", status=405)
    if words[0] == "GET":
        return words[1], None
    lengths = [line.split(":")[1] for line in head[1:] if line.lower().startswith("content-length")]
    if len(lengths) != 1 or not lengths[0].strip().isdigit() or int(lengths[0]) > MOST_BYTES:
        raise RequestError("expected a Content-Length of at most 1 MiB", status=413)
    try:
        fields = json.loads(await reader.readexactly(int(lengths[0])))
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError("the body is no JSON object")
    return words[1], fields
