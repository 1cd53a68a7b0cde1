"""Chat templates in Jinja, run by minijinja: no access to Python objects, and a bound on the work
(fuel)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import minijinja
import msgspec

from vllm_di.components.interfaces import ChatTemplate, Tokenizer
from vllm_di.errors import CheckpointError, ConfigError, RequestError

_GENERATION_BLOCK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


class JinjaChatTemplate(ChatTemplate):
    """The template of the tokenizer's folder, of a file, or written in the config itself.

    Templates see what Hugging Face gives them: ``messages``, ``tools``, ``add_generation_prompt``,
    ``bos_token`` and its kin, ``raise_exception``, ``strftime_now`` and ``tojson``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tokenizer_path: str | None,
        template: str | None,
        fuel: Annotated[int, msgspec.Meta(ge=1000)],
    ) -> None:
        folder = Path(tokenizer_path) if tokenizer_path else None
        config = _read_json(folder / "tokenizer_config.json") if folder else {}
        names = {k: _name(v) for k, v in config.items() if k.endswith("_token")}
        self._globals = names | {
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
        }
        sources = _given(template) if template else _of_folder(folder, config)
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=fuel,
            debug=False,
            filters={"tojson": _tojson},
            globals={"raise_exception": _refuse, "strftime_now": time.strftime},
            auto_escape_callback=lambda name: False,
        )
        for name, (source, place) in sources.items():
            try:
                self._environment.add_template(name, _without_generation_blocks(source))
            except minijinja.TemplateError as error:
                raise ConfigError(f"{place}: {_first_line(error)}") from None
        self._names = sources.keys()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if not self._names:
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
            if name in _RESERVED:
                raise RequestError(
                    f"chat_template_kwargs must not set {name!r}", param="chat_template_kwargs"
                )
        plain = [_plain(message, i) for i, message in enumerate(messages)]
        if not plain:
            raise RequestError("messages must not be empty", param="messages")
        name = "tool_use" if tools and "tool_use" in self._names else "default"
        values = dict(kwargs or {}) | self._globals
        try:
            text = self._environment.render_template(
                name,
                **values,
                messages=plain,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
            )
        except minijinja.TemplateError as error:
            raise RequestError(
                f"the chat template cannot render these messages: {_first_line(error)}",
                param="messages",
            ) from None
        return _up_to_final(text, plain[-1]["content"]) if continue_final_message else text


def _given(template: str) -> dict[str, tuple[str, str]]:
    """``template`` is a file's path, or, where it holds Jinja marks, the template itself."""
    if "{%" in template or "{{" in template:
        return {"default": (template, "chat_template.template")}
    try:
        return {"default": (Path(template).read_text("utf-8"), template)}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template.template={template}: the file cannot be read: {error}"
        ) from None


def _of_folder(folder: Path | None, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """``chat_template.jinja`` wins over the key in ``tokenizer_config.json``, which holds one
    template or a list of named ones."""
    if folder is None:
        return {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": (file.read_text("utf-8"), str(file))}
    place = f"{folder / 'tokenizer_config.json'}: chat_template"
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": (found, place)}
    if isinstance(found, list):
        named = {t["name"]: (t["template"], f"{place}.{t['name']}") for t in found}
        return named if "default" in named else {}
    return {}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _name(token: Any) -> str:
    """A special token is written as a string or as ``{"content": ...}``."""
    return str(token.get("content", "") if isinstance(token, dict) else token or "")


def _without_generation_blocks(source: str) -> str:
    """``{% generation %}`` marks text for training masks; here it is a block that always runs."""

    def plain(match: re.Match[str]) -> str:
        return f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}"

    return _GENERATION_BLOCK.sub(plain, source)


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with its content as one string."""
    place = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{place}.role must be a string", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text(part, f"{place}.content[{i}]") for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise RequestError(
            f"{place}.content must be a string or a list of text parts", param="messages"
        )
    plain = {**message, "content": content or ""}
    if message.get("tool_calls"):
        plain["tool_calls"] = [_decoded(call, place) for call in message["tool_calls"]]
    return plain


def _text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise RequestError(
            f"{place}: only parts of type 'text' are understood, got {str(kind)[:40]!r}",
            param="messages",
            code="unsupported_parameter",
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{place}.text must be a string", param="messages")
    text: str = part["text"]
    return text


def _decoded(call: Any, place: str) -> dict[str, Any]:
    """Templates expect the arguments of an earlier tool call as an object; OpenAI sends JSON
    text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"{place}.tool_calls: each needs a function", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.MsgspecError, RecursionError):
            raise RequestError(
                f"{place}.tool_calls: the arguments are not JSON", param="messages"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _up_to_final(text: str, final: str) -> str:
    """Cut what the template puts after the last message, so that the model goes on writing it.
    Templates may strip a message, so the search is for its core."""
    core = final.strip()
    start = text.rfind(core)
    if not core or start < 0:
        raise RequestError(
            "continue_final_message: the last message is empty, or the template changes it",
            param="continue_final_message",
        )
    end = start + len(core)
    tail = final[len(final.rstrip()) :]
    return text[: end + len(tail)] if tail and text.startswith(tail, end) else text[:end]


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """As Hugging Face's: no HTML escapes."""
    known = {k: options[k] for k in ("separators", "sort_keys") if k in options}
    return json.dumps(value, ensure_ascii=False, indent=indent, **known)


def _refuse(message: str) -> str:
    raise RequestError(f"the chat template refuses these messages: {message}", param="messages")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
