"""No chat template: only completions are served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from vllm_di.components.interfaces import ChatTemplate
from vllm_di.errors import RequestError


class NoChatTemplate(ChatTemplate):
    """Refuses every conversation with a RequestError (400)."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        raise RequestError(
            "this server has no chat template (chat_template=none); use /v1/completions instead",
            param="messages",
            code="chat_not_supported",
        )
