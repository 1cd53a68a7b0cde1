"""The endpoints, one for each path."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vllm_di.components.interfaces import INTERFACE_VERSION, Replica
from vllm_di.errors import RequestError
from vllm_di.frontend.requests import check_token_ids
from vllm_di.server import answers
from vllm_di.server.anthropic.endpoints import count_tokens, start_messages
from vllm_di.server.anthropic.request import ConversationRequest, MessagesRequest
from vllm_di.server.body import read_request
from vllm_di.server.chat import start_chat
from vllm_di.server.completions import start_completion
from vllm_di.server.endpoint import GenerateEndpoint
from vllm_di.server.errors import error_body
from vllm_di.server.openapi import openapi
from vllm_di.server.operations import Operation
from vllm_di.server.overview import Overview
from vllm_di.server.page.endpoints import Page
from vllm_di.server.pooling.embeddings import Embeddings
from vllm_di.server.pooling.scores import Ranking, Scores
from vllm_di.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from vllm_di.server.responses.endpoints import Responses
from vllm_di.server.responses.request import ResponsesRequest
from vllm_di.server.service import Service
from vllm_di.version import __version__

OF_BATCHES = ("batches", "files")
NOT_HERE = (
    *OF_BATCHES,
    "assistants",
    "audio",
    "conversations",
    "fine_tuning",
    "images",
    "moderations",
    "realtime",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
)
"""Parts of OpenAI's API."""
CLOSE = 0.8
"""Likeness by difflib of a path that was meant: /chat/completions has 0.92 to /v1/chat/completions,
/v1/v1/messages 0.89 to /v1/messages."""


class Endpoints:
    """Those that generate nothing."""

    def __init__(self, service: Service, offered: Sequence[Operation]) -> None:
        """``offered``: all operations, described by ``openapi``."""
        self._service, self._offered = service, offered
        self._openapi: bytes | None = None

    async def health(self, request: Request) -> Response:
        """200 while requests can be served, else 503."""
        return self._state(ready_only=True)

    async def load(self, request: Request) -> Response:
        """``server_load``: choices running or waiting, as vLLM calls it; and each replica's."""
        answer: dict[str, Any] = {"server_load": self._service.admission.in_flight}
        if replicas := self._service.engine.replicas():
            answer["replicas"] = [
                {"running_or_waiting": r.load.num_requests, "tokens": r.load.num_tokens}
                for r in replicas
            ]
        return _json(answer)

    async def live(self, request: Request) -> Response:
        """503 only if the engine is dead, so that a restart helps."""
        return self._state(ready_only=False)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._service.check_model(request.path_params["model"])
        return _json(self._model())

    async def version(self, request: Request) -> Response:
        config = self._service.config
        return _json(
            {
                "version": __version__,
                "platform": config.platform,
                "level": config.level,
                "claimed_level": config.claimed_level,
                "interface": INTERFACE_VERSION,
            }
        )

    async def metrics(self, request: Request) -> Response:
        if self._service.engine.state == "ready" and not self._service.admission.draining:
            _ = self._service.processor  # records the engine's info metric
        body, kind = self._service.metrics.render()
        return Response(body, headers={"content-type": kind})

    async def openapi(self, request: Request) -> Response:
        if self._openapi is None:
            self._openapi = orjson.dumps(openapi(self._offered))
        return Response(self._openapi, headers={"content-type": "application/json"})

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        body = await read_request(request, service, TokenizeRequest)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        special = body.add_special_tokens
        if body.chat_template is not None:
            raise RequestError(
                "chat_template is not supported by this server",
                param="chat_template",
                code="unsupported_parameter",
            )
        if body.messages is not None:
            text = await service.render(
                body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                kwargs=body.chat_template_kwargs,
            )
        else:
            text = body.prompt or ""
        with_special = special if special is not None else body.messages is None
        tokenizer = service.tokenizer
        ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=with_special)
        strings = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        return _json(
            {
                "count": len(ids),
                "max_model_len": service.processor.max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    async def tokenizer_info(self, request: Request) -> Response:
        service = self._service
        tokenizer = service.tokenizer
        told = dict(tokenizer.info())
        if (template := service.chat_template.source) is not None:
            told["chat_template"] = template
        return _json(
            {
                "tokenizer_class": type(tokenizer).__qualname__,
                "pad_token": None,
                **told,
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "eos_token_id": tokenizer.eos_token_id,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": service.processor.max_model_len,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        service = self._service
        body = await read_request(request, service, DetokenizeRequest)
        service.check_model(body.model)
        check_token_ids(body.tokens, service.processor.vocab_size, "tokens")
        text = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    def _model(self) -> dict[str, Any]:
        report = self._service.engine.report
        return {
            "id": self._service.config.name,
            "object": "model",
            "created": self._service.started_at,
            "owned_by": "vllm-di",
            "root": self._service.config.model_name or self._service.config.name,
            "parent": None,
            "max_model_len": report.max_model_len if report else None,
            "pooling": msgspec.to_builtins(report.pooling) if report else None,
            "permission": [],
            "default_sampling_params": self._service.config.sampling,
        }

    def _state(self, *, ready_only: bool) -> Response:
        engine = self._service.engine
        state: dict[str, Any] = {"status": engine.state}
        if engine.state == "starting":
            state["stage"] = engine.stage
            if engine.failure is not None:
                state["reason"] = engine.failure
        elif engine.state == "dead":
            state["reason"] = engine.failure
        elif engine.silent:
            state = {"status": "unresponsive", "processes": list(engine.silent)}
        elif self._service.admission.draining:
            state["status"] = "draining"
        if replicas := engine.replicas():
            state["replicas"] = [_shown(replica) for replica in replicas]
        bad = engine.state == "dead" or (ready_only and state["status"] != "ready")
        return _json(state, 503 if bad else 200)


def _shown(replica: Replica) -> dict[str, str]:
    shown: dict[str, str] = {"status": replica.state}
    if replica.state == "starting":
        shown["stage"] = replica.stage
    if replica.failure is not None:
        shown["reason"] = replica.failure
    return shown


def operations(service: Service, *, tokenizer_info: bool = False) -> list[Operation]:
    """All that the server offers, with ``/tokenizer_info`` or without."""
    offered: list[Operation] = []
    other = Endpoints(service, offered)
    chat = GenerateEndpoint(service, ChatRequest, start_chat)
    completions = GenerateEndpoint(service, CompletionRequest, start_completion)
    responses = Responses(service)
    messages = GenerateEndpoint(service, MessagesRequest, start_messages)

    def get(path: str, endpoint: Any, summary: str, **fields: Any) -> Operation:
        return Operation(method="GET", path=path, endpoint=endpoint, summary=summary, **fields)

    def post(path: str, endpoint: Any, summary: str, **fields: Any) -> Operation:
        return Operation(method="POST", path=path, endpoint=endpoint, summary=summary, **fields)

    chat_types: dict[str, Any] = {"body": ChatRequest, "answer": answers.ChatCompletion}
    text_types: dict[str, Any] = {"body": CompletionRequest, "answer": answers.TextCompletion}
    message_types: dict[str, Any] = {"body": MessagesRequest, "answer": answers.AnthropicMessage}
    count_types: dict[str, Any] = {"body": ConversationRequest, "answer": answers.InputTokens}
    scores, ranking = Scores(service), Ranking(service)
    score_types: dict[str, Any] = {"body": ScoreRequest, "answer": answers.Scores}
    ranking_types: dict[str, Any] = {"body": RerankRequest, "answer": answers.Ranking}
    vector_types: dict[str, Any] = {"body": EmbeddingRequest, "answer": answers.Embeddings}
    response_types: dict[str, Any] = {"body": ResponsesRequest, "answer": answers.Response}
    tokens_types: dict[str, Any] = {"body": TokenizeRequest, "answer": answers.Tokens}
    prompt_types: dict[str, Any] = {"body": DetokenizeRequest, "answer": answers.Prompt}
    of_response: dict[str, Any] = {"answer": answers.Response, "statuses": (400, 404)}
    of_state: dict[str, Any] = {
        "answer": answers.State,
        "statuses": (503,),
        "as_answered": (503,),
    }
    page = Page(service)
    of_page: dict[str, Any] = {"statuses": (404,)}
    count = partial(count_tokens, service)
    response = "/v1/responses/{id}"
    offered += [
        post("/v1/chat/completions", chat, "An answer to a conversation.", **chat_types),
        post("/v1/completions", completions, "What follows a text.", **text_types),
        post("/v1/messages", messages, "An answer in Anthropic's form.", **message_types),
        post("/v1/messages/count_tokens", count, "Tokens of a conversation.", **count_types),
        post("/v1/responses", responses, "A response.", **response_types),
        get(response, responses.get, "A stored response.", **of_response),
        Operation(
            method="DELETE",
            path=response,
            endpoint=responses.delete,
            summary="Forget a response.",
            answer=answers.Deleted,
            statuses=(404,),
        ),
        post(f"{response}/cancel", responses.cancel, "End a response.", **of_response),
        post("/v1/embeddings", Embeddings(service), "Vectors of texts.", **vector_types),
        post("/v1/score", scores, "How alike pairs of texts are.", **score_types),
        post("/score", scores, "The same as /v1/score.", **score_types),
        post("/v1/rerank", ranking, "Documents in the order of a query.", **ranking_types),
        post("/rerank", ranking, "The same as /v1/rerank.", **ranking_types),
        post("/v2/rerank", ranking, "The same as /v1/rerank.", **ranking_types),
        get("/v1/models", other.models, "The model.", answer=answers.ModelList),
        get(
            "/v1/models/{model:path}",
            other.model,
            "The model, by its name.",
            answer=answers.Model,
            statuses=(404,),
        ),
        post("/tokenize", other.tokenize, "The tokens of a text.", **tokens_types),
        post("/detokenize", other.detokenize, "The text of tokens.", **prompt_types),
        get("/health", other.health, "Whether requests can be served.", **of_state),
        get("/load", other.load, "Requests running or waiting.", answer=answers.Load),
        get("/ping", other.health, "The same as /health.", **of_state),
        get("/readyz", other.health, "The same as /health.", **of_state),
        get("/livez", other.live, "Whether a restart would not help.", **of_state),
        get("/version", other.version, "Versions and platform.", answer=answers.Version),
        get("/metrics", other.metrics, "Prometheus metrics.", media_type="text/plain"),
        get("/openapi.json", other.openapi, "This description."),
        get("/assembly", page.assembly, "What fills each slot.", answer=Overview, **of_page),
        get("/", page.index, "The page.", media_type="text/html", **of_page),
        get("/page.css", page.style, "Its style.", media_type="text/css", **of_page),
        get("/page.js", page.script, "Its script.", media_type="text/javascript", **of_page),
    ]
    if tokenizer_info:
        info_types: dict[str, Any] = {"answer": answers.TokenizerInfo, "statuses": (503,)}
        text = "The tokenizer's settings and the chat template."
        offered.append(get("/tokenizer_info", other.tokenizer_info, text, **info_types))
    return offered


def routes(offered: Sequence[Operation]) -> list[Route]:
    """All routes of the server."""
    return [Route(one.path, one.endpoint, methods=[one.method]) for one in offered]


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in the form of the API that was asked."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message = f"{request.method[:20]} is not allowed on this path"
        refusal = RequestError(message, code="method_not_allowed", status=405)
    else:
        message = _no_such_path(request.url.path, request.app.routes)
        refusal = RequestError(message, code="unknown_path", status=error.status_code)
    headers = {**(error.headers or {}), "content-type": "application/json"}
    body = error_body(refusal, request.url.path)
    return Response(body, error.status_code, headers=headers)


def _no_such_path(path: str, offered: Sequence[Route]) -> str:
    """A client's base URL with one /v1 too few or too many is the usual reason."""
    message = f"there is no path {path[:100]!r}"
    kind = next((name for name in NOT_HERE if f"{path}/".startswith(f"/v1/{name}/")), None)
    if kind is not None:
        instead = "; vllm-di run-batch answers a file of requests" if kind in OF_BATCHES else ""
        return f"{message}: {kind} is not supported by this server{instead}"
    known = [route.path for route in offered if "{" not in route.path]
    close = difflib.get_close_matches(path[:100], known, n=1, cutoff=CLOSE)
    return f"{message}; did you mean {close[0]!r}?" if close else message


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, headers={"content-type": "application/json"})
