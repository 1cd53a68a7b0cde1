"""The `tokenizers` library on a checkpoint's ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as RustTokenizer

from vllm_di.components.interfaces import PairTokens, Tokenizer
from vllm_di.components.tokenizer.pairs import longest_first
from vllm_di.errors import CheckpointError, RequestError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HfTokenizer(Tokenizer):
    """A folder with ``tokenizer.json``; ``tokenizer_config.json`` beside it names the special
    tokens."""

    def __init__(self, *, path: str | None) -> None:
        if path is None:
            raise CheckpointError(
                "the checkpoint brings no tokenizer: set tokenizer.path to a folder with "
                "tokenizer.json, or choose the byte-level stand-in with tokenizer=bytes"
            )
        folder = Path(path)
        file = folder / "tokenizer.json" if folder.is_dir() else folder
        if not file.is_file():
            raise CheckpointError(
                f"tokenizer.path={path}: there is no {file}; a folder with tokenizer.json is "
                "expected (a model in the Hugging Face layout has one), or choose tokenizer=bytes"
            )
        try:
            self._tokenizer: Any = RustTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is not a readable tokenizer: {error}") from None
        # A saved truncation would cut prompts, a saved padding would lengthen them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        config = self._config = _read_config(file.parent)
        self.bos_token = _token_name(config.get("bos_token"))
        self.eos_token = _token_name(config.get("eos_token"))
        self.eos_token_id: int | None = (
            self._tokenizer.token_to_id(self.eos_token) if self.eos_token else None
        )
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        steps = _decoder_steps(file)
        self._bytes_of_chars = _gpt2_alphabet() if "ByteLevel" in steps else None
        self.is_byte_level = set(steps) == {"ByteLevel"}
        self._bytes: dict[int, bytes] = {}
        """``token_bytes`` of the ids that were asked for."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Releases the interpreter lock while it works. Raises RequestError for text that is no
        Unicode."""
        ids: list[int] = self._encode(text, None, add_special_tokens).ids
        return ids

    def encode_pair(
        self,
        one: str,
        other: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        max_other: int | None = None,
    ) -> PairTokens:
        """By the pair template of tokenizer.json."""
        if max_other is None:
            whole = self._encode(one, other, add_special_tokens)
            if max_tokens is None or len(whole.ids) <= max_tokens:
                return PairTokens(whole.ids, whole.type_ids)
        first, second = self._encode(one, None, False), self._encode(other, None, False)
        if max_other is not None:
            second.truncate(max_other)
        if max_tokens is not None:
            added = self._tokenizer.num_special_tokens_to_add(True) if add_special_tokens else 0
            sizes = longest_first(len(first.ids), len(second.ids), max_tokens - added)
            first.truncate(sizes[0])
            second.truncate(sizes[1])
        joined = self._tokenizer.post_process(first, second, add_special_tokens)
        if add_special_tokens and self._tokenizer.post_processor is not None:
            return PairTokens(joined.ids, joined.type_ids)
        # texts that were encoded apart are both of type 0, and here no template says more
        return PairTokens(joined.ids, [place or 0 for place in joined.sequence_ids])

    def _encode(self, text: str, other: str | None, add_special_tokens: bool) -> Any:
        try:
            return self._tokenizer.encode(text, other, add_special_tokens=add_special_tokens)
        except TypeError:
            raise RequestError("the text holds a lone surrogate, which is no character") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids outside the vocabulary have no text."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes_of(self.token_text(token_id))
            if known:  # an id outside the vocabulary has none
                self._bytes[token_id] = known
        return known

    def _bytes_of(self, token: str) -> bytes:
        if (table := self._bytes_of_chars) is not None:
            try:
                return bytes([table[char] for char in token])
            except KeyError:  # an added token is written plainly
                return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def info(self) -> dict[str, Any]:
        kept = {k: v for k, v in self._config.items() if not k.endswith(("_file", "_path"))}
        kept.pop("chat_template", None)
        return {key: _plain(value) for key, value in kept.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, completed by ``special_tokens_map.json``; both are optional."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            try:
                merged |= msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
            except msgspec.MsgspecError as error:
                raise CheckpointError(f"{file} is damaged: {error}") from None
    return merged


def _plain(value: Any) -> Any:
    """``value`` with each token as its text, as transformers shows it."""
    if isinstance(value, dict):
        if isinstance(text := value.get("content"), str):
            return text
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    is_huge = isinstance(value, int) and not -(2**63) <= value < 2**63  # "no limit", in some files
    return float(value) if is_huge else value


def _token_name(value: Any) -> str | None:
    """A special token is written as a string or as ``{"content": ...}``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _decoder_steps(file: Path) -> list[str]:
    """The types of what makes text of tokens, in order."""
    decoder = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile).decoder or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return [str(step.get("type")) for step in steps]


class _TokenizerFile(msgspec.Struct):
    decoder: dict[str, Any] | None = None


def _gpt2_alphabet() -> dict[str, int]:
    """Character to byte in byte-level vocabularies (GPT-2): printable Latin-1 stands for itself,
    the other bytes, in order, for the characters from U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
