"""What the server offers, as data: one entry for each method of each path. Routes, ``openapi.json``
and ``vllm-di run-batch`` are made from it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vllm_di.server.protocol import StreamRequest


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """A method of a path."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    """As Starlette writes it: ``/v1/responses/{id}``."""
    endpoint: Any
    """What Starlette's ``Route`` takes."""
    summary: str
    """For ``openapi.json``: a few words, or a sentence."""
    body: type[msgspec.Struct] | None = None
    """The request's; None where it has none."""
    answer: type[msgspec.Struct] | None = None
    """Of status 200; None where it has no form that could be described."""
    media_type: str = "application/json"
    """Of an answer without a type."""
    statuses: tuple[int, ...] = ()
    """Besides those that every operation has, or every one with a body."""
    as_answered: tuple[int, ...] = ()
    """Those of ``statuses`` whose body is an ``answer`` as well."""

    @property
    def streams(self) -> bool:
        """Whether the body may ask for events."""
        return self.body is not None and issubclass(self.body, StreamRequest)

    @property
    def is_batch(self) -> bool:
        """Whether a line of a batch file may ask for it: a body, and nothing in the path."""
        return self.method == "POST" and self.body is not None and "{" not in self.path
