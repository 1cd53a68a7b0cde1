"""Finds the templates and special tokens: in the config, a file, or the tokenizer's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_di.components.interfaces import Tokenizer
from vllm_di.errors import CheckpointError, ConfigError


class Sources(msgspec.Struct, frozen=True):
    """What a template engine needs."""

    templates: dict[str, str]
    """Name to Jinja source: ``default``, and further ones of the tokenizer (``tool_use``). Empty if
    there is none."""
    place: str
    """Where the default template was found, for error messages."""
    tokens: dict[str, str]
    """The special tokens that the tokenizer has: ``bos_token`` and others."""

    def error(self, reason: object) -> ConfigError:
        """For a template that does not compile."""
        return ConfigError(f"{self.place}: {reason}; chat_template=none serves without chat")


def templates_of(folder: str | None, template: str | None) -> tuple[dict[str, str], str]:
    """Name to source, and where the default one was found; as ``find``, without a tokenizer."""
    if template:
        return _given(template)
    path = Path(folder) if folder else None
    return _of_folder(path, _read_json(path / "tokenizer_config.json") if path else {})


def find(tokenizer: Tokenizer, tokenizer_path: str | None, template: str | None) -> Sources:
    """``template`` has precedence over the folder. Raises ConfigError or CheckpointError."""
    folder = Path(tokenizer_path) if tokenizer_path else None
    config = _read_json(folder / "tokenizer_config.json") if folder else {}
    named = {k: _token(v) for k, v in config.items() if k.endswith("_token")}
    named |= {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    tokens = {name: token for name, token in named.items() if token is not None}
    templates, place = _given(template) if template else _of_folder(folder, config)
    return Sources(templates, place, tokens)


def _given(template: str) -> tuple[dict[str, str], str]:
    """``template`` is a path, or, if it contains ``{%`` or ``{{``, the template itself."""
    if "{%" in template or "{{" in template:
        return {"default": template}, "chat_template.template"
    try:
        return {"default": Path(template).read_text("utf-8")}, template
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template.template={template}: the file cannot be read: {error}"
        ) from None


def _of_folder(folder: Path | None, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """``chat_template.jinja``, with named ones in ``additional_chat_templates``, has precedence
    over the key in ``tokenizer_config.json``, which holds one template or several named ones."""
    if folder is None:
        return {}, ""
    file = folder / "chat_template.jinja"
    if file.is_file():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {"default": _read(file)} | {f.stem: _read(f) for f in others}, str(file)
    place = f"{folder / 'tokenizer_config.json'}: chat_template"
    value = config.get("chat_template")
    if isinstance(value, str):
        return {"default": value}, place
    if value is None:
        return {}, place
    try:
        named = (
            msgspec.convert(value, dict[str, str])
            if isinstance(value, dict)
            else {t.name: t.template for t in msgspec.convert(value, list[_Named])}
        )
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{place}: expected a template, or several with name and template: {error}"
        ) from None
    return (named if "default" in named else {}), place


class _Named(msgspec.Struct):
    name: str
    template: str


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _token(value: Any) -> str | None:
    """A special token is a string or ``{"content": ...}``. None for other values, such as that of
    ``add_bos_token``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
