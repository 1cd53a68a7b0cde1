"""Chat templates rendered by minijinja in this process, without access to Python objects and with a
limit on instructions (fuel). Most templates work; a few render differently than in Jinja2."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import minijinja
import msgspec

from vllm_di.components.chat_template.filters import tojson
from vllm_di.components.chat_template.prompt import RenderedTemplate
from vllm_di.components.chat_template.sources import find
from vllm_di.components.interfaces import Tokenizer
from vllm_di.errors import RequestError

_GENERATION_BLOCK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class MinijinjaChatTemplate(RenderedTemplate):
    """The template comes from the tokenizer's folder, a file, or the config itself. Raises
    ConfigError when it does not compile, or loses the user's text (see ``RenderedTemplate``)."""

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
            filters={"tojson": tojson},
            tests={"iterable": _is_sequence, "sequence": _is_sequence},
            globals={"raise_exception": _refuse, "strftime_now": time.strftime},
            auto_escape_callback=lambda name: False,
        )
        for name, source in sources.templates.items():
            try:
                self._environment.add_template(name, _without_generation_blocks(source))
            except minijinja.TemplateError as error:
                raise sources.error(_first_line(error)) from None
        super().__init__(sources, require_text=require_text)

    def _run(self, name: str, values: Mapping[str, Any]) -> str:
        try:
            return self._environment.render_template(name, **values)
        except RequestError:
            raise
        except Exception as error:  # methods of values raise other types
            raise RequestError(
                f"the chat template cannot render these messages: {_first_line(error)}",
                param="messages",
            ) from None


def _without_generation_blocks(source: str) -> str:
    """Replace ``{% generation %}``, which marks text for training, by a block that always runs."""

    def plain(match: re.Match[str]) -> str:
        return f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}"

    return _GENERATION_BLOCK.sub(plain, source)


def _is_sequence(value: Any) -> bool:
    """As in Jinja2, where strings and mappings are sequences and None is not iterable; minijinja's
    own test raises for None."""
    return isinstance(value, (str, Sequence, Mapping))


def _refuse(message: str) -> str:
    raise RequestError(f"the chat template refuses these messages: {message}", param="messages")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
