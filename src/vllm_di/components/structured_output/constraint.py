"""What a client asked of the text, from the fields that OpenAI and vLLM have for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from vllm_di.errors import RequestError, nearest

Kind = Literal["json", "regex", "choice", "grammar"]


class Constraint(msgspec.Struct, frozen=True):
    """One constraint on a whole answer."""

    kind: Kind
    value: Any
    """A JSON schema (an object, or a boolean), a regular expression, a list of texts, or a grammar
    in Lark or GBNF."""
    param: str
    """The request's field, for errors."""
    place: str
    """Where in that field the value stands: ``json_schema.schema``; may be empty."""
    any_whitespace: bool | None = None
    """Whether JSON may have white space at will; None: as the component is set."""

    def error(self, message: str, code: str | None = None, at: str = "") -> RequestError:
        """A refusal of this constraint. ``at``: a JSON pointer into the schema."""
        if self.param == "tools":  # whose schemas stand in the one that holds them all
            at = re.sub(
                r"^/items/anyOf/(\d+)/properties/parameters", r"[\1].function.parameters", at
            )
        message = f"at {at}: {message}" if at else message
        before = f"{self.param}.{self.place}" if self.place else self.param
        return RequestError(f"{before}: {message}", param=self.param, code=code)


ANY_OBJECT: dict[str, Any] = {"type": "object"}
_GUIDED: dict[str, Kind] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "disable_fallback")
"""Of vLLM's ``structured_outputs``; what they stand for is in ``_structured_outputs``."""


def read_constraint(fields: Mapping[str, Any]) -> Constraint | None:
    """The constraint in ``SamplingParams.structured_output``; None where the text is free. Raises
    RequestError for a field that is malformed, or for two constraints."""
    found: list[Constraint] = []
    readers: dict[str, Callable[[Any], Constraint | None]] = {
        "response_format": _response_format,
        "structured_outputs": _structured_outputs,
        "tools": _tools,
    }
    for name, value in fields.items():
        if name in readers:
            one = readers[name](value)
        elif name in _GUIDED:
            one = _checked(Constraint(_GUIDED[name], value, name, ""))
        else:
            raise RequestError(
                f"structured_output: {name!r} is not known; it has "
                f"{', '.join([*readers, *_GUIDED])}{nearest(name, [*readers, *_GUIDED])}",
                param="structured_output",
            )
        if one is not None:
            found.append(one)
    if len(found) > 1:
        raise RequestError(
            f"{found[0].param} and {found[1].param} both constrain the answer: leave one out",
            param=found[1].param,
        )
    return found[0] if found else None


def _tools(value: Any) -> Constraint:
    """Made by the server for calls that must come: ``{"schema": ..., "place": ...}``."""
    return _checked(Constraint("json", value["schema"], "tools", value.get("place") or ""))


def _response_format(value: Any) -> Constraint | None:
    param = "response_format"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", ANY_OBJECT, param, "")
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise RequestError(
                f'{param}: expected {{"type": "json_schema", "json_schema": {{"name": ..., '
                '"schema": {...}}}',
                param=param,
            )
        return _checked(Constraint("json", inner["schema"], param, "json_schema.schema"))
    known = ["text", "json_object", "json_schema"]
    raise RequestError(
        f"{param}.type: expected {', '.join(known)}, got {str(kind)[:100]!r}"
        f"{nearest(str(kind)[:100], known)}",
        param=param,
    )


def _structured_outputs(value: Any) -> Constraint | None:
    param = "structured_outputs"
    if not isinstance(value, Mapping):
        raise RequestError(f"{param}: expected an object", param=param)
    given = {name: v for name, v in value.items() if v is not None and v is not False}
    whitespace = None
    if "disable_any_whitespace" in value:
        whitespace = not value["disable_any_whitespace"]
    if given.pop("disable_additional_properties", None):
        raise RequestError(
            f"{param}.disable_additional_properties is not supported: write "
            "additionalProperties: false into the schema",
            param=param,
            code="unsupported_parameter",
        )
    for name in _OPTIONS:
        given.pop(name, None)
    kinds: dict[str, Kind] = {k: k for k in ("json", "regex", "choice", "grammar")}
    known = [*kinds, "json_object"]
    for name in given:
        if name not in known:
            raise RequestError(
                f"{param}.{name[:100]} is not supported; it has {', '.join(known)}"
                f"{nearest(name[:100], known)}",
                param=param,
                code="unsupported_parameter",
            )
    if len(given) != 1:
        what = f"got {' and '.join(given)}" if given else "got none"
        raise RequestError(
            f"{param}: exactly one of {', '.join(known)} is expected, {what}", param=param
        )
    ((name, content),) = given.items()
    if name == "json_object":
        return Constraint("json", ANY_OBJECT, param, name, whitespace)
    return _checked(Constraint(kinds[name], content, param, name, whitespace))


def _checked(one: Constraint) -> Constraint:
    """With a schema that came as text decoded. Raises RequestError for a value of another type."""
    value = one.value
    if one.kind == "json":
        if isinstance(value, str):
            try:
                value = msgspec.json.decode(value)
            except (msgspec.DecodeError, RecursionError) as error:
                raise one.error(f"the schema is not valid JSON: {error}") from None
        if not isinstance(value, dict | bool):
            raise one.error(f"a JSON schema is an object, got {type(value).__name__}")
    elif one.kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(c, str) for c in value):
            raise one.error("expected a list of texts, at least one")
    elif not isinstance(value, str):
        raise one.error(f"expected a text, got {type(value).__name__}")
    return msgspec.structs.replace(one, value=value)
