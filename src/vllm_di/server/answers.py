"""The JSON that endpoints answer with, as types for ``openapi.json``. The bodies are made by hand,
since many of their parts come as bytes; a test holds them to these."""

from __future__ import annotations

from typing import Literal

import msgspec

from vllm_di.server.protocol import Object


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Object


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: Object | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    stop_reason: int | str | None
    token_ids: list[int] = []


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[Object | None] | None = None
    prompt_token_ids: list[int] = []


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: Object | None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | str | None
    prompt_logprobs: list[Object | None] | None = None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class TextCompletion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class MessageUsage(msgspec.Struct):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Object]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class InputTokens(msgspec.Struct):
    input_tokens: int


class Response(msgspec.Struct):
    """Of ``/v1/responses``; the fields of the request come with it."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete", "in_progress", "cancelled", "failed"]
    output: list[Object]
    usage: Object | None
    error: Object | None
    incomplete_details: Object | None


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: bool


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None
    pooling: Object | None
    permission: list[Object]
    default_sampling_params: dict[str, float]


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class PoolingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: PoolingUsage


class Score(msgspec.Struct):
    object: Literal["score"]
    index: int
    score: float


class Scores(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


class DocumentText(msgspec.Struct):
    text: str


class Rank(msgspec.Struct):
    index: int
    relevance_score: float
    document: DocumentText | None = None


class Ranking(msgspec.Struct):
    id: str
    model: str
    usage: PoolingUsage
    results: list[Rank]


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfo(msgspec.Struct, omit_defaults=True):
    """With whatever else the checkpoint's ``tokenizer_config.json`` says."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    vocab_size: int
    model_max_length: int
    """Of the engine: ``model.max_model_len``."""
    chat_template: str | None = None


class Prompt(msgspec.Struct):
    prompt: str


class ReplicaState(msgspec.Struct):
    status: Literal["starting", "ready", "draining", "unresponsive", "dead"]
    stage: str | None = None
    reason: str | None = None


class State(msgspec.Struct):
    status: Literal["starting", "ready", "dead", "unresponsive", "draining"]
    stage: str | None = None
    reason: str | None = None
    processes: list[str] = []
    replicas: list[ReplicaState] = []


class ReplicaLoad(msgspec.Struct):
    running_or_waiting: int
    tokens: int


class Load(msgspec.Struct):
    server_load: int
    replicas: list[ReplicaLoad] = []


class Version(msgspec.Struct):
    version: str
    platform: str | None
    level: str | None
    claimed_level: str | None
    interface: str


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """In OpenAI's form."""

    error: ErrorDetail


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    type: Literal["error"]
    error: AnthropicErrorDetail
