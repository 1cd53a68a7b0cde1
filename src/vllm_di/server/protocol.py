"""The requests that clients send: OpenAI's fields and vLLM's extensions, decoded strictly.

A known field that this server does not support is refused. Unknown fields are counted, or refused
with ``server.unknown_fields=refuse``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from vllm_di.components.messages import SamplingParams
from vllm_di.errors import RequestError, nearest
from vllm_di.server.misfits import misfit

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
EXACT = "x-exact"
"""In the JSON schema of a field: what takes the place of its ``anyOf``, since no type says it."""
_TOKENS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
}
Prompt = Annotated[list[Int], msgspec.Meta(max_length=2**20)]
"""The longest contexts have that many tokens."""
Prompts = Annotated[
    str | Annotated[list[str | Int | Prompt], msgspec.Meta(max_length=2**20)],
    msgspec.Meta(
        description="One prompt or several, each a text or token ids.",
        extra_json_schema={
            EXACT: [  # not text and token ids beside each other
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                _TOKENS,
                {"type": "array", "minItems": 1, "items": _TOKENS},
            ]
        },
    ),
]
VocabularyIds = Annotated[list[Int], msgspec.Meta(max_length=2**18)]
"""The largest vocabularies have that many tokens."""
FewTokenIds = Annotated[list[Int], msgspec.Meta(max_length=1024)]
ShortText = Annotated[str, msgspec.Meta(max_length=1024)]
Stops = Annotated[list[ShortText], msgspec.Meta(max_length=16)]
BadWords = Annotated[
    list[Annotated[str, msgspec.Meta(max_length=128)]], msgspec.Meta(max_length=256)
]
LogitBias = Annotated[
    dict[Int, float],
    msgspec.Meta(
        max_length=4096,
        extra_json_schema={"propertyNames": {"pattern": r"^(0|-?[1-9][0-9]{0,17})(?!\n)$"}},
    ),
]
Budget = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Priority = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
CacheSalt = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Object = dict[str, Any]
"""JSON that is passed on unchanged. The limits on the body's length and depth hold for it."""
Messages = Annotated[list[Object], msgspec.Meta(max_length=16_384)]
Tools = Annotated[list[Object], msgspec.Meta(max_length=1024)]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StreamRequest(msgspec.Struct, kw_only=True):
    """One whose answer may be a stream. None, like null, means not set."""

    stream: bool | None = None


class SamplingRequest(StreamRequest, kw_only=True):
    """What OpenAI's three kinds of requests for text have in common, vLLM's extensions among it."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    seed: Int | None = None
    stop: ShortText | Stops | None = None
    stop_token_ids: FewTokenIds | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: Object | None = None
    """The engine accepts or refuses it."""
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None


class GenerateRequest(SamplingRequest, kw_only=True):
    """What chat and plain completions have in common."""

    stream_options: StreamOptions | None = None
    # sampling
    n: Int | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    allowed_token_ids: VocabularyIds | None = None
    bad_words: BadWords | None = None
    # structured output: the engine accepts or refuses it
    response_format: Object | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # the rest
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # known, and refused when given
    best_of: Any = None
    use_beam_search: Any = None
    logits_processors: Any = None
    truncate_prompt_tokens: Any = None
    spaces_between_special_tokens: bool | None = None
    prompt_embeds: Any = None


class ChatRequest(GenerateRequest, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Object], msgspec.Meta(min_length=1, max_length=16_384)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Object | None = None
    # for the tool parser
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Tools | None = None
    function_call: Any = None
    # for the reasoning parser
    reasoning_effort: Any = None
    reasoning: Any = None
    thinking: Any = None
    thinking_token_budget: Budget | None = None
    # known, and refused when given
    chat_template: Any = None
    echo: Any = None
    audio: Any = None
    web_search_options: Any = None
    modalities: Annotated[list[ShortText], msgspec.Meta(max_length=16)] | None = None


class CompletionRequest(GenerateRequest, kw_only=True):
    """``POST /v1/completions``."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Int | None = None
    suffix: Any = None


class PoolingRequest(msgspec.Struct, kw_only=True):
    """What requests for embeddings, scores and rankings have in common."""

    model: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None


class EmbeddingRequest(PoolingRequest, kw_only=True):
    """``POST /v1/embeddings``."""

    input: str | Annotated[list[str | Int | Prompt], msgspec.Meta(max_length=2**20)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None


Texts = Annotated[list[str | Int | Prompt], msgspec.Meta(max_length=2**20)]


class ScoreRequest(PoolingRequest, kw_only=True):
    """``POST /v1/score``: pairs of texts."""

    text_1: str | Texts
    text_2: str | Texts


class Document(msgspec.Struct, kw_only=True):
    text: str


class RerankRequest(PoolingRequest, kw_only=True):
    """``POST /v1/rerank``, of Jina and Cohere."""

    query: str
    documents: Annotated[list[str | Document], msgspec.Meta(max_length=2**20)]
    top_n: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /tokenize``: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Object | None = None
    chat_template: Any = None
    tools: Tools | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Prompt


IGNORED = frozenset(
    [
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "verbosity",
        "request_id",
        "include_reasoning",
    ]
)
"""Known fields that cannot change an answer of this server, so ignoring them is correct."""

REFUSED = [
    "use_beam_search",
    "logits_processors",
    "truncate_prompt_tokens",
    "prompt_embeds",
    "chat_template",
    "audio",
    "web_search_options",
    "suffix",
]
"""Known fields that are refused whatever they hold, but for null, false and an empty text."""
_SAMPLING = [
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "max_tokens",
    "ignore_eos",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
]
_STRUCTURED = [
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
]

T = TypeVar("T", bound=msgspec.Struct)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
"""msgspec's words."""


def decode(body: bytes, kind: type[T], *, max_depth: int) -> tuple[T, list[str]]:
    """The request, and the names of its unknown fields. Raises RequestError."""
    _check_depth(body, max_depth)
    fields: dict[str, msgspec.Raw] = {}
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        request = _decode(body, kind)
    except msgspec.ValidationError as error:
        if missing := _MISSING.fullmatch(str(error)):
            raise _missing(missing[1], fields, kind) from None
        message, field = misfit(error, kind)
        raise RequestError(message, param=field, code="invalid_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    known = IGNORED.union(kind.__struct_fields__)
    return request, [name for name in fields if name not in known]


def _missing(name: str, fields: Iterable[str], kind: type[msgspec.Struct]) -> RequestError:
    """For a body without a field that is needed; it may be there under a misspelt name."""
    known = IGNORED.union(kind.__struct_fields__)
    others = [other[:80] for other in fields if other not in known]
    typed = next((other for other in others if nearest(other, [name])), None)
    hint = f", and {typed!r} is no field; did you mean {name!r}?" if typed else ""
    return RequestError(f"{name}: this field is needed{hint}", param=name, code="invalid_type")


def _decode(body: bytes, kind: type[T]) -> T:
    """Strict, except that 5.0 is accepted as an integer: JSON has one type of number, and some
    clients write integers so."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        if not str(error).startswith("Expected `int"):
            raise
        fields: dict[str, Any] = msgspec.json.decode(body)
        for name in _takes_integers(kind) & fields.keys():
            fields[name] = _integral(fields[name])
        return msgspec.convert(fields, kind, str_keys=True)  # those of logit_bias are numbers


def _takes_integers(kind: type[msgspec.Struct]) -> set[str]:
    """Names of fields that are integers or lists of them."""
    return {f.name for f in msgspec.structs.fields(kind) if _mentions_int(f.type)}


def _mentions_int(kind: Any) -> bool:
    return kind is int or any(_mentions_int(inner) for inner in get_args(kind))


def _integral(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_integral(item) for item in value]
    return value


def refuse_unknown(kind: type[msgspec.Struct], names: list[str]) -> None:
    """For ``unknown_fields=refuse``."""
    if names:
        name = names[0][:80]
        raise RequestError(
            f"unknown field {name!r}{nearest(name, kind.__struct_fields__)}",
            param=name,
            code="unknown_field",
        )


def sampling_params(
    request: GenerateRequest,
    *,
    logprobs: int | None,
    max_tokens: int | None,
    defaults: Mapping[str, int | float],
) -> SamplingParams:
    """Checked sampling parameters; ``defaults`` apply to what the request does not set. Raises
    RequestError for what this server does not support."""
    _check_supported(request)
    values: dict[str, Any] = dict(defaults)
    values |= {n: v for n in _SAMPLING if (v := getattr(request, n)) is not None}
    stop = request.stop
    values["stop"] = [stop] if isinstance(stop, str) else stop or []
    values["max_tokens"] = max_tokens
    if logprobs is not None:
        values["logprobs"] = logprobs
    return SamplingParams(**values, structured_output=_structured_output(request))


def _check_supported(request: GenerateRequest) -> None:
    for name in REFUSED:
        value = getattr(request, name, None)
        # `in` would take 0, which is a value, for False
        if not (value is None or value is False or value == ""):
            raise unsupported(name)
    if request.best_of not in (None, request.n or 1):
        raise unsupported("best_of")
    if request.spaces_between_special_tokens is False:
        raise unsupported("spaces_between_special_tokens")
    if isinstance(request, ChatRequest):
        if request.echo:
            raise unsupported("echo")
        if request.modalities not in (None, ["text"]):
            raise unsupported("modalities")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options goes only with stream=true", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs is not available with stream=true", param="prompt_logprobs"
        )


def unsupported(name: str) -> RequestError:
    """For a field that is known, and that this server cannot honour."""
    return RequestError(
        f"{name} is not supported by this server", param=name, code="unsupported_parameter"
    )


def _structured_output(request: GenerateRequest) -> Object | None:
    constraints = {n: v for n in _STRUCTURED if (v := getattr(request, n)) is not None}
    format_ = request.response_format
    if format_ is not None and format_.get("type") != "text":
        constraints["response_format"] = format_
    for name, value in constraints.items():
        try:
            msgspec.msgpack.encode(value)
        except OverflowError:
            raise RequestError(f"{name}: an integer has more than 64 bits", param=name) from None
    return constraints or None


_SIGN = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_PIECE = 1 << 16


def _check_depth(body: bytes, limit: int) -> None:
    """Refuse deep nesting before a parser recurses into it. One pass over pieces of the body, with
    no Python loop over bytes: splitting at quotes gives what is outside and inside strings in
    turn."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    # Escaped backslashes first: a quote after an odd number of backslashes does not end a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth = is_inside = 0
    for start in range(0, len(plain), _PIECE):
        parts = plain[start : start + _PIECE].split(b'"')
        brackets = b"".join(parts[is_inside::2]).translate(_SIGN, _NOT_BRACKETS)
        is_inside = (is_inside + len(parts) - 1) % 2
        depths = list(accumulate(memoryview(brackets).cast("b"), initial=depth))
        depth = depths[-1]
        if max(depths) > limit:
            raise RequestError(f"the JSON is nested deeper than {limit}", code="invalid_json")
