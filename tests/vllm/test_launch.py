"""The launcher's checks before vLLM starts, and the entry point, without vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata

import pytest

from vllm_di.commands.arguments import UsageError, parse
from vllm_di.commands.vllm import run
from vllm_di.errors import ConfigError
from vllm_di.vllm import entry, hooks, versions
from vllm_di.vllm.launch import command, refuse_holes


@pytest.fixture
def vllm_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.32.0+cpu")
    monkeypatch.delenv("DI_CONFIG", raising=False)


def started(words: Sequence[str], flags: Sequence[str] = ()) -> list[str]:
    return command("serve", words, flags)[3:]


@pytest.mark.usefixtures("vllm_is_here")
def test_choices_travel_in_additional_config() -> None:
    line = started(["m", "attention=sdpa"], ["--max-model-len", "4096"])
    assert line[:4] == ["serve", "m", "--max-model-len", "4096"]
    assert line[4] == "--additional-config"
    assert json.loads(line[5]) == {"vllm_di": [["attention=sdpa", "command line"]]}


@pytest.mark.usefixtures("vllm_is_here")
@pytest.mark.parametrize(
    "flags",
    [
        ["--additional-config", '{"x": 1, "vllm_di": ["ops=torch"]}', "--port", "1"],
        ['--additional_config={"x": 1, "vllm_di": ["ops=torch"]}', "--port", "1"],
    ],
)
def test_a_config_of_the_users_own_is_kept(flags: list[str]) -> None:
    line = started(["m", "attention=sdpa"], flags)
    assert line[2:4] == ["--port", "1"]
    assert json.loads(line[-1]) == {
        "x": 1,
        "vllm_di": ["ops=torch", ["attention=sdpa", "command line"]],
    }


@pytest.mark.usefixtures("vllm_is_here")
def test_nothing_chosen_is_plain_vllm() -> None:
    assert started(["m"], ["--port", "1"]) == ["serve", "m", "--port", "1"]


@pytest.mark.usefixtures("vllm_is_here")
@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (["m", "attention=sdap"], [], "did you mean 'sdpa'"),
        (["m", "n", "attention=sdpa"], [], "'n' is no override"),
        (["m", "attention=sdpa"], ["--attention-backend", "FLEX_ATTENTION"], "leave one out"),
        (["m", "attention=sdpa"], ["--attention_backend=FLASH_ATTN"], "leave one out"),
        (["m", "scheduler._target_=vllm.a.B"], ["--scheduler-cls", "a.B"], "leave one out"),
        (["m", "quantization=int8"], ["--quantization", "fp8"], "leave one out"),
        (["m", "attention=sdpa"], ["--additional-config", "{"], "is not JSON"),
        (["m", "attention=sdpa"], ["--additional-config", "[]"], "expected a mapping"),
        (["m", "attention._target_=mine.A"], [], "is refused: only classes of vllm, vllm_di"),
        (["m", "attention._target_=mine.A", "trust=[mine]"], [], None),  # vLLM's process imports it
    ],
)
def test_what_is_wrong_is_said_before_vllm_starts(
    words: list[str], flags: list[str], message: str | None
) -> None:
    if message is None:
        assert started(words, flags)
        return
    with pytest.raises(ConfigError, match=message):
        command("serve", words, flags)


def test_the_two_holes_are_refused() -> None:
    refuse_holes({"VLLM_PLUGINS": "vllm_di,other"})
    with pytest.raises(ConfigError, match="VLLM_PLUGINS: 'other' leaves vllm_di out"):
        refuse_holes({"VLLM_PLUGINS": "other"})
    with pytest.raises(ConfigError, match="VLLM_TARGET_DEVICE"):
        refuse_holes({"VLLM_TARGET_DEVICE": "cpu"})


def test_without_vllm_the_launcher_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed here.*0\.28\.0 to 0\.32\.0"):
        command("serve", ["m", "platform=cpu", "attention=sdpa"], [])


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0+cpu", "1.0"])
def test_a_version_outside_the_range_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: version)
    with pytest.raises(ConfigError, match="outside the tested range"):
        versions.check()


@pytest.mark.parametrize("version", ["0.28.0", "0.30.2+cpu", "0.32.1"])
def test_a_version_within_the_range_passes(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: version)
    versions.check()


def test_another_plugin_goes_first_unless_somebody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "acme"

    monkeypatch.delenv("DI_CONFIG", raising=False)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()])
    assert not entry.active()
    monkeypatch.setenv("DI_CONFIG", "attention=sdpa")
    assert entry.active()
    with pytest.raises(ConfigError, match="acme"):
        refuse_holes({})
    monkeypatch.setenv("VLLM_PLUGINS", "vllm_di")
    refuse_holes({"VLLM_PLUGINS": "vllm_di"})


def test_the_platform_is_vllms_class_with_hooks() -> None:
    class Own:
        """vLLM's."""

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            return "vllm.a.B"

    made = hooks.platform_of(Own)
    assert issubclass(made, Own)
    assert made.__name__ == "Own"
    assert hooks.platform_of(Own) is made


def test_words_behind_the_dashes_are_vllms() -> None:
    arguments = parse("vllm", ["serve", "m", "attention=sdpa", "--", "--port", "1", "a=b"])
    assert arguments.words == ["serve", "m"]
    assert arguments.overrides == ["attention=sdpa"]
    assert arguments.rest == ["--port", "1", "a=b"]
    with pytest.raises(UsageError, match="--"):
        parse("serve", ["--", "x"])
    with pytest.raises(UsageError, match="did you mean 'serve'"):
        run(parse("vllm", ["sirve"]))
