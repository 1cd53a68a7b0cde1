"""Errors inside vLLM. Pydantic wraps a ValueError that a config's hook raises into an error of its
own, so that this one is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_di.errors import ConfigError, VllmDiError


class VllmSlotError(VllmDiError):
    """A choice for a slot of vLLM is wrong, or cannot be honoured; says where it stands."""


@contextmanager
def plain() -> Iterator[None]:
    """ConfigErrors, which are ValueErrors, leave the block as VllmSlotError."""
    try:
        yield
    except ConfigError as error:
        raise VllmSlotError(str(error)) from error
