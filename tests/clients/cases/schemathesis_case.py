"""Requests made from ``openapi.json``: no status that it does not name, no answer of another form,
and nothing refused for its shape that the schema allows."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

EXAMPLES = 40
SHAPES = ("invalid_type", "invalid_json")
"""``error.code`` of a body whose shape is wrong."""
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
"""Without these values hardly a request would get past the first checks."""


def config() -> Any:
    return schemathesis.Config.from_dict(
        {"generation": {"mode": "all", "allow-x00": False}, "seed": 1}
    )


def check_every_operation(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config())
    found: list[str] = []
    count, good = 0, [0]
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/metrics":
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not list(operation.body):
                continue
            strategy = operation.as_strategy(generation_mode=mode)
            count += _try(operation, strategy, mode, found, good)
    assert count > 300, count
    assert good[0] > 60, f"{good[0]} of {count} were answered with 200"
    assert not found, f"{len(found)} of {count}:\n" + "\n".join(found[:20])


def _try(operation: Any, strategy: Any, mode: Any, found: list[str], good: list[int]) -> int:
    from hypothesis import given

    count = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(case: Any) -> None:
        nonlocal count
        count += 1
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body |= {name: GOOD[name] for name in GOOD.keys() & case.body.keys()}
        response = case.call(timeout=60)
        good[0] += response.status_code == 200
        where = f"{operation.method.upper()} {operation.path} {case.body!r:.300}"
        told = f"{response.status_code} {response.text[:300]}"
        if response.status_code >= 500 and response.status_code != 503:
            found.append(f"{where}: {told}")
            return
        code = _code(response)
        if mode is GenerationMode.POSITIVE and code in SHAPES:
            found.append(f"refused, though the schema allows it: {where}: {told}")
        try:
            case.validate_response(response, checks=[CHECKS.get_one(name) for name in DOCUMENTED])
        except (Exception, BaseExceptionGroup) as error:
            found.append(f"{where}: {told}: {str(error)[:300]}")

    one()
    return count


DOCUMENTED = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")


def _code(response: Any) -> str | None:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(error, dict):  # a good response says that it has none
        return None
    if "code" not in error:  # Anthropic's form has none
        return "invalid_type" if "Expected `" in error["message"] else None
    code: str | None = error["code"]
    return code
