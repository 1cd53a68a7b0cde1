"""An endpoint of a model that pools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import orjson
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from vllm_di.components.messages import EngineRequest, TokenOutput
from vllm_di.errors import RequestError
from vllm_di.frontend.pooling import PoolingProcessor, Text
from vllm_di.server.body import read_request
from vllm_di.server.observers import WORK
from vllm_di.server.pooling.running import run_all
from vllm_di.server.protocol import PoolingRequest
from vllm_di.server.sending import send_json
from vllm_di.server.service import Service

P = TypeVar("P", bound=PoolingRequest)


class PoolingAnswer(ABC):
    """What one request wants of the engine, and what becomes of it."""

    requests: list[EngineRequest]

    @abstractmethod
    def body(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        """Raises RequestError."""


class PoolingEndpoint(ABC, Generic[P]):
    """A body becomes a typed request, this becomes engine requests, their vectors an answer. An
    ASGI application, because it watches the connection while the engine works."""

    kind: type[P]

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        service.admission.check_open()
        request = await read_request(Request(scope, receive), service, self.kind)
        service.check_model(request.model)
        answer = await self.start(request, service.pooling)
        outputs = await run_all(service, answer.requests, receive, scope[WORK].pooled.append)
        await send_json(send, orjson.dumps(answer.body(outputs)))

    @abstractmethod
    async def start(self, request: P, processor: PoolingProcessor) -> PoolingAnswer:
        """Check a request and tokenise its texts. Raises RequestError."""

    def check_count(self, count: int, param: str) -> None:
        """Raise RequestError for no texts, or too many."""
        limit = self._service.config.max_inputs
        if not count:
            raise RequestError(f"{param} must not be empty", param=param)
        if count > limit:
            raise RequestError(
                f"{param}: one request may have {limit} texts (server.max_inputs), got {count}",
                param=param,
            )


def options(request: PoolingRequest) -> dict[str, Any]:
    """Of ``PoolingProcessor.request``."""
    return {
        "add_special_tokens": request.add_special_tokens is not False,
        "max_tokens": request.truncate_prompt_tokens,
        "priority": request.priority or 0,
        "cache_salt": request.cache_salt,
    }


def texts_of(value: str | list[Any], param: str) -> list[Text]:
    """A text or a list of them, each as a string or as token ids. Raises RequestError."""
    if isinstance(value, str):
        return [value]
    kinds = {type(item) for item in value}
    if len(kinds) > 1:
        raise RequestError(f"{param} must not mix texts and token ids", param=param)
    return [value] if kinds == {int} else value
