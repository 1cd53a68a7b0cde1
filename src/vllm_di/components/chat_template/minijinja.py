"""Chat templates run by minijinja in this process: no access to Python objects, and a bound on the
work (fuel). It takes most templates, and renders a few otherwise than Jinja2."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import minijinja
import msgspec

from vllm_di.components.chat_template.prompt import Prompter
from vllm_di.components.chat_template.sources import find
from vllm_di.components.interfaces import ChatTemplate, Tokenizer
from vllm_di.errors import ConfigError, RequestError

_GENERATION_BLOCK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class MinijinjaChatTemplate(ChatTemplate):
    """The template of the tokenizer's folder, of a file, or written in the config itself. Raises
    ConfigError where it does not compile, or loses the user's text (see ``Prompter``)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tokenizer_path: str | None,
        template: str | None,
        require_text: bool = False,
        fuel: Annotated[int, msgspec.Meta(ge=1000)],
    ) -> None:
        sources = find(tokenizer, tokenizer_path, template)
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=fuel,
            debug=False,
            filters={"tojson": _tojson},
            tests={"iterable": _is_iterable, "sequence": _is_sequence},
            globals={"raise_exception": _refuse, "strftime_now": time.strftime},
            auto_escape_callback=lambda name: False,
        )
        for name, source in sources.templates.items():
            try:
                self._environment.add_template(name, _without_generation_blocks(source))
            except minijinja.TemplateError as error:
                raise ConfigError(
                    f"{sources.place}: {_first_line(error)}; chat_template=none serves without chat"
                ) from None
        self._prompter = Prompter(sources, self._render, require_text=require_text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        return self._prompter.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
        )

    def _render(self, name: str, values: Mapping[str, Any]) -> str:
        try:
            return self._environment.render_template(name, **values)
        except RequestError:
            raise
        except Exception as error:  # methods of values raise their own
            raise RequestError(
                f"the chat template cannot render these messages: {_first_line(error)}",
                param="messages",
            ) from None


def _without_generation_blocks(source: str) -> str:
    """``{% generation %}`` marks text for training masks; here it is a block that always runs."""

    def plain(match: re.Match[str]) -> str:
        return f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}"

    return _GENERATION_BLOCK.sub(plain, source)


def _tojson(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's: no HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _is_iterable(value: Any) -> bool:
    """minijinja's own test raises for None."""
    return isinstance(value, (str, Sequence, Mapping))


def _is_sequence(value: Any) -> bool:
    """In Jinja2 a string and a mapping are sequences too."""
    return isinstance(value, (str, Sequence, Mapping))


def _refuse(message: str) -> str:
    raise RequestError(f"the chat template refuses these messages: {message}", param="messages")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
