"""The components of the API process, shared by all endpoints."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vllm_di.components.interfaces import (
    ChatTemplate,
    EngineClient,
    Metrics,
    ReasoningParser,
    Tokenizer,
    ToolParser,
)
from vllm_di.components.messages import SamplingParams, WorkerReport
from vllm_di.errors import RequestError
from vllm_di.frontend.pooling import PoolingProcessor
from vllm_di.frontend.processor import Generation, RequestProcessor
from vllm_di.frontend.requests import Prepared
from vllm_di.server.admission import Admission
from vllm_di.server.config import ServerConfig
from vllm_di.server.overview import Overview
from vllm_di.server.protocol import GenerateRequest

_LONG_TEXT = 4_000
"""Prompts longer than this, in characters, are tokenised in a thread, so that streams go on."""

_RENDER_THREADS = 8
"""They wait for the render processes. Not asyncio's default threads: the tokenizer needs those
while slow prompts render."""


class Service:
    """Holds the components, and the request processor once the engine is ready."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        tool_parser: ToolParser,
        reasoning_parser: ReasoningParser,
        metrics: Metrics,
        engine: EngineClient,
        config: ServerConfig,
        *,
        has_keys: bool = False,
    ) -> None:
        """``has_keys``: whether clients need an API key."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self.metrics = metrics
        self.engine = engine
        self.config = config
        self.has_keys = has_keys
        self.overview: Callable[[], Overview] | None = None
        """How the server was assembled; None where nobody said."""
        self.admission = Admission(engine, config.max_queue)
        self.started_at = int(time.time())
        self._render_threads = ThreadPoolExecutor(_RENDER_THREADS, "render")
        self._processor: RequestProcessor | None = None
        self._report: WorkerReport | None = None

    @property
    def default_max_tokens(self) -> int | None:
        """For requests that do not set it. None: as many as fit into the context."""
        value = self.config.sampling.get("max_tokens")
        return None if value is None else int(value)

    @property
    def processor(self) -> RequestProcessor:
        """Raises RequestError (503) while the engine cannot answer. The first call after the engine
        is ready records its info metric."""
        self.admission.check_open()
        report = self.engine.report
        assert report is not None, "a ready engine has reported"
        if (
            self._processor is None or report is not self._report
        ):  # a restarted engine has a new one
            self._report = report
            self._processor = RequestProcessor(
                self.tokenizer, report.max_model_len, report.vocab_size
            )
            parts = {
                "tokenizer": self.tokenizer,
                "chat_template": self.chat_template,
                "tool_parser": self.tool_parser,
                "reasoning_parser": self.reasoning_parser,
            }
            labels = {slot: type(part).__qualname__ for slot, part in parts.items()}
            for replica, each in enumerate(self.engine.reports()):
                self.metrics.of(replica).info(each, labels)
        return self._processor

    @property
    def pooling(self) -> PoolingProcessor:
        """Raises RequestError: 503 while the engine cannot answer, 400 of a model that
        generates."""
        _ = self.processor
        assert self._report is not None
        return PoolingProcessor(self.tokenizer, self._report, self.config.name)

    def check_generates(self) -> None:
        """Raise 400 for a model that pools."""
        _ = self.processor
        if self._report is not None and self._report.pooling is not None:
            raise RequestError(
                f"the model {self.config.name!r} makes {self._report.pooling.kind}s and generates "
                "no text; pooler=none makes a model with a head for tokens generate",
                param="model",
                code="generation_off",
            )

    def check_model(self, name: str | None) -> None:
        """Raise 404 for a model that is not the one served."""
        if name is not None and name != self.config.name:
            raise RequestError(
                f"the model {name[:100]!r} does not exist; this server serves {self.config.name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        kwargs: Mapping[str, Any] | None,
    ) -> str:
        """The prompt of a conversation. ``add_generation_prompt`` defaults to True, unless the last
        message is continued. Raises RequestError."""
        continues = bool(continue_final_message)
        if add_generation_prompt is None:
            add_generation_prompt = not continues
        render = partial(
            self.chat_template.render,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continues,
            kwargs=kwargs,
        )
        return await asyncio.get_running_loop().run_in_executor(self._render_threads, render)

    async def start(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | Prepared,
        request: GenerateRequest,
        *,
        add_special_tokens: bool,
    ) -> Generation:
        """Tokenise and check one prompt."""
        processor = self.processor

        def begin() -> Generation:
            return processor.start(
                request_id,
                prompt,
                params,
                add_special_tokens=add_special_tokens,
                priority=request.priority or 0,
                cache_salt=request.cache_salt,
                default_max_tokens=self.default_max_tokens,
            )

        if isinstance(prompt, str) and len(prompt) > _LONG_TEXT:
            return await asyncio.to_thread(begin)
        return begin()


def new_id(prefix: str) -> str:
    """The server makes all ids: those of two clients could be equal."""
    return f"{prefix}-{uuid.uuid4().hex}"
