"""The model generates."""

from __future__ import annotations

from typing import NoReturn

from vllm_di.components.interfaces import Pooler


class NoPooler(Pooler):
    """Pools nothing, and is never called."""

    def __init__(self) -> None: ...

    def pools(self) -> bool:
        return False

    def report(self, size: int) -> NoReturn:
        raise NotImplementedError("pooler=none pools nothing")

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        raise NotImplementedError("pooler=none pools nothing")

    def take(self, rows: object, state: object) -> None:
        raise NotImplementedError("pooler=none pools nothing")

    def finish(self, state: object) -> NoReturn:
        raise NotImplementedError("pooler=none pools nothing")
