"""Masks of tokens by the library llguidance, which works them out while the answer grows: there is
no table for each grammar, and compiling one takes about a millisecond."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from vllm_di.components.interfaces import MaskTask, StructuredOutput, Tokenizer
from vllm_di.components.messages import SamplingParams
from vllm_di.components.structured_output.constraint import Constraint, read_constraint
from vllm_di.components.structured_output.places import place_of_error
from vllm_di.components.structured_output.thinking import Closings, ThoughtPlace, separated
from vllm_di.components.structured_output.thought import split
from vllm_di.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

Count = Annotated[int, msgspec.Meta(ge=1)]

INITIAL_FUEL = 1_000_000
"""Of building a lexer: the library's own default, about 20 ms."""
STEP_FUEL, STEP_ITEMS = 50_000, 20_000
"""Of working out one mask: at most about 5 ms and 30 ms. The library's defaults are 4 and 2.5 times
that."""
STATE_BYTES = 8_192
"""Most that a state of a lexer was seen to take: 7 kB, with ``(.*a.{50}){10}``."""
VERDICTS = 1_024
"""Constraints whose check is remembered."""
PATIENCE = 8
"""A check on a busy machine is waited for so many times as long as a compile may take."""
LONGEST_ERROR = 500
"""Characters of the library's message, and of a place, that a client is told."""
BYTE_EOS = 256
log = logging.getLogger(__name__)


class LlguidanceOutput(StructuredOutput):
    """JSON schemas, regular expressions, choices, grammars in Lark and GBNF.

    A check compiles for single bytes as tokens, so that the engine needs no tokenizer. What the
    library cannot honour is refused, never left out.
    """

    def __init__(
        self,
        *,
        vocabulary: Callable[[], Tokenizer],
        any_whitespace: bool,
        compile_seconds: Annotated[float, msgspec.Meta(gt=0)],
        max_grammar_bytes: Count,
        max_lexer_states: Count,
        cache_bytes: Count,
        threads: Count,
    ) -> None:
        self._vocabulary = vocabulary
        self._any_whitespace = any_whitespace
        self._seconds, self._max_bytes = compile_seconds, max_grammar_bytes
        self._max_states = max_lexer_states
        self._most_kept = max(1, cache_bytes // (max_lexer_states * STATE_BYTES))
        self._num_threads = threads
        self._lock = Lock()
        self._compilers: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None
        self._tokenizers: dict[tuple[int, tuple[int, ...]], LLTokenizer] = {}
        self._verdicts: OrderedDict[bytes, RequestError | None] = OrderedDict()
        self._kept: OrderedDict[tuple[object, ...], LLMatcher] = OrderedDict()
        """The beginnings of grammars. Their copies share a lexer, whose states grow with use."""
        self._last_closing: tuple[tuple[int, tuple[str, ...]], Closings] | None = None

    def close(self) -> None:
        """Compilers that still run end with their fuel."""
        if self._compilers is not None:
            self._compilers.shutdown(wait=False)

    # -- in the engine --------------------------------------------------------------------------

    def check(self, params: SamplingParams) -> None:
        _, asked = split(params.structured_output or {})
        if not asked:
            return
        if find_spec("llguidance") is None:
            raise RequestError(
                "structured output needs the package llguidance, which is not installed here: "
                "pip install llguidance",
                param=_param(asked),
                code="unsupported_parameter",
            )
        key = _digest(asked, self._max_bytes)
        with self._lock:
            known = key in self._verdicts
            verdict = self._verdicts.get(key)
            if known:
                self._verdicts.move_to_end(key)
        if not known:
            verdict = self._verdict(asked)
            with self._lock:
                self._verdicts[key] = verdict
                if len(self._verdicts) > VERDICTS:
                    self._verdicts.popitem(last=False)
        if verdict is not None:
            raise RequestError(
                verdict.message, param=verdict.param, code=verdict.code, status=verdict.status
            )
        if params.ignore_eos:
            raise RequestError(
                "ignore_eos: a constrained answer ends where its grammar does; leave it out",
                param="ignore_eos",
            )

    def _verdict(self, asked: dict[str, Any]) -> RequestError | None:
        with self._lock:
            if self._compilers is None:
                self._compilers = ThreadPoolExecutor(2, "compile")
        task = self._compilers.submit(self._try, asked)
        patience = PATIENCE * self._seconds
        try:
            return task.result(patience)
        except TimeoutError:
            task.cancel()
            text = f"{_param(asked)}: it was not compiled within {patience:g} s; {self._limit()}"
            return RequestError(text, param=_param(asked))

    def _limit(self) -> str:
        return f"the limit is structured_output.compile_seconds={self._seconds:g}"

    def _try(self, asked: dict[str, Any]) -> RequestError | None:
        """Compile, and work out the first mask: a grammar that no text fits has none."""
        try:
            constraint = read_constraint(asked)
            if constraint is None:
                return None
            tokenizer = self._bytes_tokenizer()
            began = time.thread_time()
            error = self._error(constraint, tokenizer)
            if (took := time.thread_time() - began) > self._seconds:  # a worker would wait as long
                error = f"it takes {took:.2f} s of a core to compile; {self._limit()}"
                return constraint.error(error)
            if not error:
                return None
            place = ""
            if constraint.kind == "json":
                place = place_of_error(
                    constraint.value,
                    error,
                    lambda part: self._error(
                        msgspec.structs.replace(constraint, value=part), tokenizer
                    ),
                )
            if len(place) > LONGEST_ERROR:
                place = f"{place[:LONGEST_ERROR]}..."
            return constraint.error(error, at=place)
        except RequestError as refusal:
            return refusal
        except RecursionError:
            return RequestError("the grammar is nested too deep", param=_param(asked))

    def _error(self, constraint: Constraint, tokenizer: LLTokenizer) -> str:
        try:
            matcher = self._compiled(constraint, tokenizer)
        except _UnreadableError as error:
            return str(error)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return _readable(matcher.get_error())

    def _bytes_tokenizer(self) -> LLTokenizer:
        key = (0, (BYTE_EOS,))
        with self._lock:
            if key not in self._tokenizers:
                tokens = [*(bytes([byte]) for byte in range(256)), b"</s>"]
                self._tokenizers[key] = _tokenizer(tokens, [BYTE_EOS], [BYTE_EOS], list)
            return self._tokenizers[key]

    # -- in a worker ----------------------------------------------------------------------------

    def start(
        self, params: SamplingParams, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> LLMatcher | ThoughtPlace | None:
        thought, asked = split(params.structured_output or {})
        ends = tuple(eos_token_ids)
        kept = self._beginning(asked, vocab_size, ends) if asked else None
        begin = None if kept is None else kept.deep_copy
        if thought is not None:
            closings = self._closing(vocab_size, tuple(thought.closing))
            return ThoughtPlace(
                thought, closings, eos_token_ids=ends, begin=begin, allows=_may_come
            )
        return None if begin is None else begin()

    def _beginning(
        self, asked: dict[str, Any], vocab_size: int, ends: tuple[int, ...]
    ) -> LLMatcher | None:
        """To be copied. Raises RequestError."""
        if not ends:
            raise RequestError(
                "the model has no end-of-sequence token, so a constrained answer cannot end",
                param=_param(asked),
            )
        key = (vocab_size, ends, _digest(asked, self._max_bytes))
        if (kept := self._kept.get(key)) is None:
            constraint = read_constraint(asked)
            if constraint is None:
                return None
            kept = self._compiled(constraint, self._tokenizer(vocab_size, ends))
            if error := kept.get_error():
                raise constraint.error(_readable(error))
            self._kept[key] = kept
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return kept

    def fill(self, tasks: Sequence[MaskTask]) -> None:
        answers = list(separated(tasks))
        self._fill([answer.task for _, answer in answers])
        for task, answer in answers:
            answer.join()
            task.error = task.error or answer.task.error

    def _fill(self, tasks: Sequence[MaskTask]) -> None:
        from llguidance import LLExecutor

        if self._executor is None:
            self._executor = LLExecutor(self._num_threads)
        tasks = [task for task in tasks if not _is_free(task)]
        for task in tasks:
            if task.tokens and not task.place.consume_tokens(list(task.tokens)):
                error = _readable(task.place.get_error())
                task.error = error or "a token that the grammar does not allow"
        good = [task for task in tasks if task.error is None]
        if not good:
            return
        width = good[0].masks.shape[1]
        whole = np.empty((sum(len(task.masks) for task in good), width), np.uint32)
        plain, drafted, at = [], [], 0
        for task in good:
            if task.drafts:
                whole[at : at + len(task.masks)] = task.masks
                drafted.append((task.place, at, list(task.drafts)))
            else:
                plain.append((task.place, at))
            at += len(task.masks)
        where = (whole.ctypes.data, width * 4, len(whole))
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *where)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
        at = 0
        for task in good:
            task.masks[:] = whole[at : at + len(task.masks)]
            at += len(task.masks)
            if task.place.is_error():  # its mask allows the end: it must not be taken for one
                task.error = _readable(task.place.get_error())

    def _tokenizer(self, vocab_size: int, ends: tuple[int, ...]) -> LLTokenizer:
        """Of the model's vocabulary: 0.3 s for 49,152 tokens, once."""
        key = (vocab_size, ends)
        if key not in self._tokenizers:
            source, tokens = self._vocabulary(), self._tokens(vocab_size)
            known = range(min(vocab_size, source.vocab_size))
            special = sorted({*(i for i in known if source.is_special(i)), *ends})

            def encode(text: str) -> list[int]:
                return source.encode(text, add_special_tokens=False)

            self._tokenizers[key] = _tokenizer(tokens, special, list(ends), encode)
        return self._tokenizers[key]

    def _tokens(self, vocab_size: int) -> list[bytes]:
        """The bytes of each id."""
        source = self._vocabulary()
        tokens = [source.token_bytes(i) for i in range(min(vocab_size, source.vocab_size))]
        return tokens + [b""] * (vocab_size - len(tokens))

    def _closing(self, vocab_size: int, marks: tuple[str, ...]) -> Closings:
        """Those of the last thought are kept: a model's marks are always the same."""
        if self._last_closing is None or self._last_closing[0] != (vocab_size, marks):
            self._last_closing = (vocab_size, marks), Closings(self._tokens(vocab_size), marks)
        return self._last_closing[1]

    # -- both -----------------------------------------------------------------------------------

    def _compiled(self, constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
        """May be in an error state: see ``get_error``."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=INITIAL_FUEL,
            step_lexer_fuel=STEP_FUEL,
            step_max_items=STEP_ITEMS,
            max_lexer_states=self._max_states,
            verbose_errors=False,
        )
        return LLMatcher(tokenizer, self._grammar(constraint), log_level=0, limits=limits)

    def _grammar(self, constraint: Constraint) -> str:
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

        value = constraint.value
        if constraint.kind == "regex":
            return LLMatcher.grammar_from_regex(value)
        if constraint.kind == "choice":
            return "start: " + " | ".join(
                json.dumps(choice, ensure_ascii=False) for choice in value
            )
        if constraint.kind == "grammar":
            try:
                return str(any_to_lark(value))
            except GbnfToLarkError as error:
                raise _UnreadableError(f"neither Lark nor GBNF: {error}") from None
        flexible = constraint.any_whitespace
        flexible = self._any_whitespace if flexible is None else flexible
        options: Any = {"whitespace_flexible": flexible, "lenient": False}
        if not flexible:
            options |= {"item_separator": ", ", "key_separator": ": "}
        schema = {} if value is True else {"not": {}} if value is False else value
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)


class _UnreadableError(Exception):
    """A grammar that is neither Lark nor GBNF."""


class _Vocabulary:
    """What the library wants of a tokenizer."""

    bos_token_id = None

    def __init__(
        self,
        tokens: list[bytes],
        special: list[int],
        eos_token_id: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self._encode = eos_token_id, encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _tokenizer(
    tokens: list[bytes], special: list[int], ends: list[int], encode: Callable[[Any], list[int]]
) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(_Vocabulary(tokens, special, ends[0], encode))
    return LLTokenizer(wrapped, eos_token=ends)


def _is_free(task: MaskTask) -> bool:
    if task.place is None:  # response_format=text
        task.masks.fill(0xFFFFFFFF)
    return task.place is None


def _may_come(place: LLMatcher, token: int) -> bool:
    return place.validate_tokens([token]) == 1


def _digest(asked: dict[str, Any], most: int) -> bytes:
    """Raises RequestError for what is too long."""
    try:
        data = msgspec.json.encode(asked)
    except RecursionError:
        raise RequestError("the grammar is nested too deep", param=_param(asked)) from None
    if len(data) > most:
        raise RequestError(
            f"{_param(asked)}: a grammar may have {most:,} bytes, this one has {len(data):,} "
            "(structured_output.max_grammar_bytes)",
            param=_param(asked),
        )
    return hashlib.blake2b(data, digest_size=16).digest()


def _param(asked: dict[str, Any]) -> str:
    return next(iter(asked), "structured_output")


def _readable(error: str) -> str:
    """The library's message without its marks; for a grammar that no text fits, what that is."""
    text = error.replace("<non-verbose/>", "").strip()
    if text.startswith("NoExtension"):
        return "no text fits it"
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}..."
