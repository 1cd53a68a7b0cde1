"""From messages to a prompt: what all template engines share."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_di.components.chat_template.conversation import (
    Form,
    Forms,
    lost_user_text,
    open_ended,
    prepared,
    up_to_mark,
)
from vllm_di.components.chat_template.sources import Sources
from vllm_di.components.interfaces import ChatTemplate
from vllm_di.errors import ConfigError, RequestError

_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
"""chat_template_kwargs must not set these, nor any special token of the tokenizer."""
_MARKER, _OTHER = "Zephyrquill", "Quillzephyr"
"""Words that no template contains: the text of a test message, and the value of an extra key, which
shows up only if a template prints whole parts instead of their text."""

_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}

_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {}}}

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]


class RenderedTemplate(ChatTemplate):
    """What the template engines share: a subclass runs one template (``_run``), this class makes
    the prompt.

    The templates are tried with a marker word when the server starts, in every form of content.
    ``require_text``: a default template that loses the text of a user message raises ConfigError at
    once, and a prompt that lacks the last user message raises RequestError.
    """

    def __init__(self, sources: Sources, *, require_text: bool) -> None:
        """Runs the templates: a subclass calls it when ``_run`` works."""
        self._tokens, self._place = sources.tokens, sources.place
        self.source = sources.templates.get("default")
        self._require_text = require_text
        self._forms: dict[str, Forms] = {}
        if sources.templates:
            self._forms["default"] = self._default_forms()
        for name in sources.templates.keys() - {"default"}:
            self._forms[name] = self._named_forms(name)

    @abstractmethod
    def _run(self, name: str, values: Mapping[str, Any]) -> str:
        """Render the template ``name``. Raises RequestError."""

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if not self._forms:
            raise RequestError(
                "the tokenizer has no chat template: set chat_template.template to a file, or "
                "use chat_template=plain",
                param="messages",
            )
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message goes only with add_generation_prompt=false",
                param="continue_final_message",
            )
        for name in kwargs or ():
            if name in _RESERVED or name in self._tokens:
                raise RequestError(
                    f"chat_template_kwargs must not set {name!r}", param="chat_template_kwargs"
                )
        name = "tool_use" if tools and "tool_use" in self._forms else "default"
        conversation = prepared(messages, self._forms[name])
        shown = open_ended(conversation) if continue_final_message else conversation
        values = self._values(shown, tools, add_generation_prompt)
        try:
            text = self._run(name, {**values, **(kwargs or {})})
        except RequestError as error:
            index = _without_content(conversation)
            if index is None or error.status != 400:
                raise
            raise RequestError(
                f"{error.message}; messages[{index}] has no content", param=error.param
            ) from None
        if continue_final_message:
            text = up_to_mark(text, conversation[-1])
        index = lost_user_text(conversation, text) if self._require_text else None
        if index is not None:
            raise RequestError(
                f"messages[{index}]: its text is missing in the prompt of the chat template "
                f"({self._place}); chat_template.require_text=false allows that",
                param="messages",
            )
        return text

    def _default_forms(self) -> Forms:
        user, why = self._form_of("default", "user")
        if user is not None:
            return self._forms_of_roles("default", user)
        message = (
            f"{self._place}: {why}; set chat_template.template to another one, or use "
            "chat_template=none to serve without chat"
        )
        if self._require_text:
            raise ConfigError(f"{message}; chat_template.require_text=false accepts it as it is")
        log.warning("%s", message)
        return Forms({})

    def _named_forms(self, name: str) -> Forms:
        """A template for tools may need tools: then the forms of the default one are used."""
        user, _ = self._form_of(name, "user")
        return self._forms["default"] if user is None else self._forms_of_roles(name, user)

    def _forms_of_roles(self, name: str, user: Form) -> Forms:
        forms = {"user": user}
        for role in ("system", "assistant"):
            form, _ = self._form_of(name, role, user)
            if form is not None:
                forms[role] = form
        return Forms(forms, self._needs_content(name, forms))

    def _needs_content(self, name: str, forms: Mapping[str, Form]) -> bool:
        def text(role: str, content: str) -> str | list[dict[str, str]]:
            wraps = role in forms and forms[role].wraps_strings
            return _as_parts(content) if wraps else content

        def fails(**content: Any) -> bool:
            called = {"role": "assistant", **content, "tool_calls": [_CALL]}
            messages = [{"role": "user", "content": text("user", "Hi")}, called]
            try:
                self._run(name, self._values(messages, None))
            except RequestError:
                return True
            return False

        return fails() and not fails(content=text("assistant", ""))

    def _form_of(self, name: str, role: str, user: Form | None = None) -> tuple[Form | None, str]:
        """Which forms of content keep the marker, in a message of this role; None and the reason if
        neither does. A template that fails without tools is tried with one."""
        hello: Any = _as_parts("Hi") if user and user.wraps_strings else "Hi"
        before = [{"role": "user", "content": hello}] if role == "assistant" else []
        after = [{"role": "user", "content": hello}] if role != "user" else []
        why = ""
        for tools in (None, [_TOOL]):
            keeps = []
            for content in (_MARKER, _as_parts(_MARKER)):
                messages = [*before, {"role": role, "content": content}, *after]
                try:
                    text = self._run(name, self._values(messages, tools))
                except RequestError as error:
                    why, text = why or error.message, ""
                else:
                    why = why or "it loses the text of user messages"
                keeps.append(_MARKER in text and _OTHER not in text)
            if any(keeps):
                return Form(*keeps), ""
        return None, why

    def _values(
        self, messages: Messages, tools: Any, add_generation_prompt: bool = True
    ) -> dict[str, Any]:
        """The variables that every template gets."""
        return {
            "documents": None,
            **self._tokens,
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text, "note": _OTHER}]


def _without_content(messages: Messages) -> int | None:
    """The first message without content. Templates fail at it in words that tell a client
    little."""
    bare = (i for i, m in enumerate(messages) if not {"content", "tool_calls"} & m.keys())
    return next(bare, None)
