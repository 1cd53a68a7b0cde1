"""An engine that echoes the prompt, and a server around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from vllm_di.components.chat_template.minijinja import MinijinjaChatTemplate
from vllm_di.components.interfaces import ChatTemplate, EngineClient
from vllm_di.components.messages import (
    EngineRequest,
    EngineStats,
    LimitsReport,
    TokenLogprobs,
    TokenOutput,
    WorkerReport,
)
from vllm_di.components.metrics.prometheus import PrometheusMetrics
from vllm_di.components.reasoning_parser.none import NoReasoningParser
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.components.tool_parser.none import NoToolParser
from vllm_di.components.tracing.none import NoTracing
from vllm_di.errors import EngineDeadError, RequestError
from vllm_di.server.app import OpenAiServer
from vllm_di.server.config import ServerConfig
from vllm_di.server.overview import ContainerView, Overview, SlotView

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""The prompt is the text of the messages, so the echo is, too."""

REPORT = WorkerReport(
    block_size=16,
    num_blocks=100,
    bytes_per_block=1024,
    kv_specs=[],
    limits=LimitsReport(),
    max_model_len=256,
    vocab_size=300,
    eos_token_ids=[257],
    device="fake",
    dtype="float32",
    weight_bytes=0,
)


OVERVIEW = Overview(
    model="echo",
    platform="test",
    platform_reason="by hand",
    announcement="platform test",
    interface="0.0",
    replicas=1,
    containers=[
        ContainerView(
            name="ServerContainer",
            part="",
            slots=[
                SlotView(
                    slot="tokenizer",
                    key="tokenizer",
                    interface="Tokenizer",
                    option="bytes",
                    target="vllm_di.components.tokenizer.bytes.BytesTokenizer",
                    chosen_by="default",
                    place="tests",
                    alternatives=["hf"],
                )
            ],
        )
    ],
)


class EchoEngine(EngineClient):
    """Answers with the prompt's own tokens, over and over, one at a time.

    ``delay`` seconds lie between tokens. After ``patience`` tokens of each request (None: never) it
    waits for ``go_on``.
    """

    def __init__(self, *, delay: float = 0.0, patience: int | None = None) -> None:
        self.state = "ready"
        self.failure = None
        self.stage = "load"
        self.report = REPORT
        self.delay = delay
        self.patience = patience
        self.go_on = asyncio.Event()
        self.died = asyncio.Event()
        self.live: set[str] = set()
        self.num_waiting = 0
        self.aborted: list[str] = []
        self.requests: list[EngineRequest] = []

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        if request.params.structured_output is not None:
            raise RequestError(
                "structured output is not supported (structured_output=none)",
                param="response_format",
                code="unsupported_parameter",
            )
        assert request.request_id not in self.live
        self.live.add(request.request_id)
        self.requests.append(request)
        is_done = False
        try:
            limit = request.params.max_tokens or 0
            for i in range(limit):
                if i == self.patience:
                    await self._wait()
                await asyncio.sleep(self.delay)
                if self.state == "dead":
                    raise EngineDeadError(self.failure or "")
                output = self._output(request, i)
                if self.on_stats is not None:
                    self.on_stats(EngineStats(num_running=len(self.live), step_tokens=1))
                is_done = i == limit - 1
                output.finish_reason = "length" if is_done else None
                yield output
        finally:
            self.live.discard(request.request_id)
            if not is_done:
                self.aborted.append(request.request_id)

    async def _wait(self) -> None:
        self.num_waiting += 1
        tasks = [asyncio.ensure_future(e.wait()) for e in (self.go_on, self.died)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.num_waiting -= 1
            for task in tasks:
                task.cancel()

    async def until_waiting(self, count: int) -> None:
        """Return when ``count`` requests wait, and all that came before has been sent."""
        while self.num_waiting < count:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)

    def _output(self, request: EngineRequest, i: int) -> TokenOutput:
        prompt = request.prompt_token_ids
        token = prompt[i % len(prompt)]
        output = TokenOutput(request_id=request.request_id, token_ids=[token])
        if (count := request.params.logprobs) is not None:
            output.logprobs = [logprobs_of(token, count)]
        if i == 0:
            output.queue_time, output.num_cached_tokens = 0.001, 1
            if (count := request.params.prompt_logprobs) is not None:
                output.prompt_logprobs = [logprobs_of(t, count) for t in prompt[1:]]
        return output

    def die(self, reason: str) -> None:
        self.state, self.failure = "dead", reason
        self.died.set()

    async def wait_ready(self) -> None:
        if self.state == "starting":
            await self._wait()
        if self.state == "starting":
            self.state = "ready"
        if self.state == "dead":
            raise EngineDeadError(self.failure or "")

    async def close(self) -> None:
        pass


def logprobs_of(token: int, count: int) -> TokenLogprobs:
    """The token is always the likeliest, then come 65, 66, ..."""
    ids = [token, token, *range(65, 65 + count)][: count + 1]
    return TokenLogprobs(ids, [-0.5, -0.5, *(-1.0 - i for i in range(count))][: count + 1], 1)


def make_server(engine: EngineClient, **settings: Any) -> OpenAiServer:
    """A server of real components round a fake engine; ``chat_template`` and the parsers may be
    others."""
    tokenizer = BytesTokenizer(vocab_size=300)
    chat_template: ChatTemplate | None = settings.pop("chat_template", None)
    server = OpenAiServer(
        tokenizer,
        chat_template
        or MinijinjaChatTemplate(tokenizer, tokenizer_path=None, template=TEMPLATE, fuel=100_000),
        settings.pop("tool_parser", None) or NoToolParser(),
        settings.pop("reasoning_parser", None) or NoReasoningParser(),
        PrometheusMetrics(model_name="echo", components={"platform": "test"}),
        settings.pop("tracing", None) or NoTracing(),
        engine,
        config=ServerConfig(model_name="echo", **settings),
    )
    server.show_assembly(lambda: OVERVIEW)
    return server


def client_of(server: OpenAiServer, **options: Any) -> httpx.AsyncClient:
    """A client that calls the application in this process."""
    transport = httpx.ASGITransport(server.app)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)


def with_client(
    test: Callable[[httpx.AsyncClient, EchoEngine], Awaitable[None]],
    *,
    engine: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Run an async test against a server in this process; at its end nothing may be left over."""

    async def main() -> None:
        echo = EchoEngine(**engine or {})
        async with client_of(make_server(echo, **settings)) as client:
            await test(client, echo)
        assert not echo.live, "every request has ended in the engine"

    asyncio.run(main())


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def completion(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": prompt, **fields}


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
