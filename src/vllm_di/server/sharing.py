"""Sends a long prompt, and lists such as ``allowed_token_ids``, to the engine process once for all
choices of a request. The engine process then holds one object for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_di.components.messages import EngineRequest
from vllm_di.frontend.requests import changed
from vllm_di.server import wire

LONG_PROMPT = 256
"""Prompts of at least this many tokens are shared; shorter ones are sent with each choice."""
_LISTS = tuple(name for name in wire.Lists.__struct_fields__ if name != "bad_words_token_ids")
"""Fields of the sampling parameters."""


@dataclass(slots=True)
class _Loan:
    key: int
    parts: tuple[object, ...]
    """Referenced here, so that no other object gets their ``id()``."""
    num_users: int = 0


class Lender:
    """The API process's side. Lists are compared by identity: the choices of a request refer to the
    same objects."""

    def __init__(self) -> None:
        self._loans: dict[tuple[int, ...], _Loan] = {}
        self._of: dict[str, list[_Loan]] = {}
        self._num_loans = 0

    def messages(self, request: EngineRequest) -> Iterator[wire.ToEngine]:
        """The messages that add a request, after those that send what the engine lacks."""
        prompt_key = lists_key = 0
        bare, lists = _split(request)
        if lists is not None:
            lists_key, is_new = self._lend(request.request_id, _parts(lists))
            if is_new:
                yield wire.Keep(lists_key, lists=lists)
        prompt = request.prompt_token_ids
        if len(prompt) >= LONG_PROMPT:
            prompt_key, is_new = self._lend(request.request_id, (prompt,))
            if is_new:
                yield wire.Keep(prompt_key, prompt=prompt)
            bare = msgspec.structs.replace(bare, prompt_token_ids=[])
        yield wire.Add(bare, prompt_key, lists_key)

    def end(self, request_id: str) -> Iterator[wire.ToEngine]:
        """The message that drops what no request uses any longer, if there is any."""
        unused = []
        for loan in self._of.pop(request_id, ()):
            loan.num_users -= 1
            if loan.num_users == 0:
                del self._loans[tuple(map(id, loan.parts))]
                unused.append(loan.key)
        if unused:
            yield wire.Drop(unused)

    def _lend(self, request_id: str, parts: tuple[object, ...]) -> tuple[int, bool]:
        """The key, and whether it is new."""
        identity = tuple(map(id, parts))
        loan = self._loans.get(identity)
        is_new = loan is None
        if loan is None:
            self._num_loans += 1
            loan = self._loans[identity] = _Loan(self._num_loans, parts)
        loan.num_users += 1
        self._of.setdefault(request_id, []).append(loan)
        return loan.key, is_new


class Borrower:
    """The engine process's side."""

    def __init__(self) -> None:
        self._kept: dict[int, wire.Keep] = {}

    def keep(self, message: wire.Keep) -> None:
        self._kept[message.key] = message

    def drop(self, message: wire.Drop) -> None:
        for key in message.keys:
            self._kept.pop(key, None)

    def request(self, message: wire.Add) -> EngineRequest:
        """The complete request. It refers to the stored objects, not to copies."""
        request = message.request
        changes: dict[str, Any] = {}
        if message.prompt:
            changes["prompt_token_ids"] = self._kept[message.prompt].prompt
        if message.lists:
            lists = self._kept[message.lists].lists
            assert lists is not None
            changes["params"] = changed(
                request.params, **{name: getattr(lists, name) for name in _LISTS}
            )
            changes["bad_words_token_ids"] = lists.bad_words_token_ids
        return msgspec.structs.replace(request, **changes) if changes else request


def _split(request: EngineRequest) -> tuple[EngineRequest, wire.Lists | None]:
    """The request without its lists, and the lists."""
    params = request.params
    values = {name: value for name in _LISTS if (value := getattr(params, name))}
    if not values:
        return request, None
    empty: dict[str, Any] = dict.fromkeys(values)
    empty |= {name: [] for name in ("stop", "stop_token_ids", "bad_words") if name in values}
    bare = msgspec.structs.replace(request, params=changed(params, **empty), bad_words_token_ids=[])
    return bare, wire.Lists(**values, bad_words_token_ids=request.bad_words_token_ids)


def _parts(lists: wire.Lists) -> tuple[object, ...]:
    return tuple(getattr(lists, name) or None for name in wire.Lists.__struct_fields__)
