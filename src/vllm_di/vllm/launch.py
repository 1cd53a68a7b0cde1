"""``vllm-di vllm serve M attention=sdpa -- --max-model-len 4096``: choices are checked here, before
vLLM's imports, and handed over in its ``--additional-config``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence

from vllm_di.errors import ConfigError
from vllm_di.vllm import versions
from vllm_di.vllm.assembled import check_parts
from vllm_di.vllm.choices import Choices, choose
from vllm_di.vllm.container import SLOTS
from vllm_di.vllm.entry import NAME, rivals
from vllm_di.vllm.sources import KEY, Override, from_environment

FLAG = "--additional-config"
MODULE = "vllm.entrypoints.cli.main"
WITHOUT_PLUGINS = ("VLLM_TARGET_DEVICE", "cpu")
"""The variable and its value with which vLLM takes a platform before it looks at plugins."""


def prepare(
    overrides: Sequence[Override], environment: Mapping[str, str] | None = None
) -> list[list[str]]:
    """Check overrides as far as it goes without importing vLLM -> what ``additional_config`` is to
    hold. Raises ConfigError."""
    choices = choose([*from_environment(), *overrides])
    versions.check()
    refuse_holes(os.environ if environment is None else environment)
    check_parts(choices)
    return [list(override) for override in overrides]


def refuse_holes(environment: Mapping[str, str]) -> None:
    """Raise ConfigError for what makes vLLM pass its plugins by, so that no choice would hold."""
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise ConfigError(
            f"env VLLM_PLUGINS: {allowed!r} leaves {NAME} out: vLLM would ignore every choice; "
            f"add {NAME}"
        )
    name, value = WITHOUT_PLUGINS
    if environment.get(name) == value:
        raise ConfigError(
            f"env {name}: with {value!r} vLLM loads no plugin and ignores all choices; "
            "unset it: vLLM's build for CPUs finds the platform itself"
        )
    if others := rivals():
        raise ConfigError(
            f"other platform plugins of vLLM's are installed: {', '.join(others)}; vLLM runs one: "
            f"name {NAME} alone in VLLM_PLUGINS, with platform._target_= the class to extend"
        )


def refuse_flags(choices: Choices, flags: Sequence[str]) -> None:
    """Raise ConfigError for a slot that a flag behind ``--`` fills too."""
    names = {flag.split("=")[0].split(".")[0].replace("_", "-") for flag in flags}
    for slot in choices.chosen:
        if SLOTS[slot].flag in names:
            raise ConfigError(
                f"{choices.where(slot)}: {slot} is chosen by {SLOTS[slot].flag} too; leave one out"
            )


def command(verb: str, words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command that takes this process's place: vLLM's ``verb`` for ``words`` (a model, then
    overrides) and ``flags`` of vLLM's own. Raises ConfigError for what is wrong."""
    model = [word for word in words if "=" not in word]
    overrides = [(word, "command line") for word in words if "=" in word]
    if len(model) > 1:
        raise ConfigError(
            f"command line: {model[1]!r} is no override; flags of vLLM's go behind --"
        )
    extra = prepare(overrides)
    refuse_flags(choose([*from_environment(), *overrides]), flags)
    rest, given = _take_config(list(flags))
    given[KEY] = [*given.get(KEY, []), *extra]
    config = [FLAG, json.dumps(given)] if given[KEY] else []
    return [sys.executable, "-m", MODULE, verb, *model, *rest, *config]


def _take_config(flags: list[str]) -> tuple[list[str], dict[str, list[object]]]:
    """-> (the other flags, what the user's own --additional-config holds)."""
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name.replace("_", "-") != FLAG:
            continue
        text = value if equals else "".join(flags[index + 1 : index + 2])
        rest = flags[:index] + flags[index + (1 if equals else 2) :]
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{FLAG}: {text!r} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{FLAG}: expected a mapping, got {text}")
        return rest, config
    return flags, {}
