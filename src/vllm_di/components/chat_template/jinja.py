"""Chat templates as transformers renders them: Jinja2's sandbox, in separate processes with limits
on CPU time and memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from vllm_di.components.chat_template.frames import Job, Setup
from vllm_di.components.chat_template.pool import RenderPool
from vllm_di.components.chat_template.prompt import RenderedTemplate
from vllm_di.components.chat_template.sources import find
from vllm_di.components.interfaces import Tokenizer
from vllm_di.errors import ConfigError

log = logging.getLogger(__name__)


class JinjaChatTemplate(RenderedTemplate):
    """The template comes from the tokenizer's folder, a file, or the config itself.

    ``processes`` render in parallel, so that a slow prompt delays no other. A process that dies, or
    uses more than ``cpu_seconds`` for a prompt, is replaced. Raises ConfigError when the template
    does not compile, or loses the user's text (see ``RenderedTemplate``).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tokenizer_path: str | None,
        template: str | None,
        require_text: bool = False,
        processes: Annotated[int, msgspec.Meta(ge=2, le=64)] = 2,
        cpu_seconds: Annotated[float, msgspec.Meta(gt=0)] = 2.0,
        memory_mib: Annotated[int, msgspec.Meta(ge=64)] = 512,
        max_chars: Annotated[int, msgspec.Meta(ge=1)] = 16_777_216,
        fuel: int | None = None,
    ) -> None:
        if fuel is not None:
            log.warning(
                "chat_template.fuel counts minijinja's instructions and has no effect here: "
                "chat_template.cpu_seconds=%g is the limit; chat_template=minijinja uses fuel",
                cpu_seconds,
            )
        sources = find(tokenizer, tokenizer_path, template)
        self._pool: RenderPool | None = None
        if sources.templates:
            setup = Setup(sources.templates, cpu_seconds, memory_mib * 2**20, max_chars)
            try:
                self._pool = RenderPool(setup, processes)
            except ConfigError as error:
                raise sources.error(error) from None
        try:
            super().__init__(sources, require_text=require_text)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes. May be called twice."""
        if self._pool is not None:
            self._pool.close()

    def _run(self, name: str, values: Mapping[str, Any]) -> str:
        assert self._pool is not None, "without a template nothing is rendered"
        return self._pool.render(Job(name, dict(values), time.time()))
