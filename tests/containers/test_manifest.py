"""The ``platform:`` node: what is refused, where, and which versions are served."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import yaml

from vllm_di.components.interfaces import INTERFACE_VERSION
from vllm_di.containers import manifest as manifest_module
from vllm_di.containers.assembly import assemble
from vllm_di.containers.manifest import Manifest, is_served, read_manifest, served_versions
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import ConfigError, PortError


def place(key: str) -> str:
    return f"chip.yaml:{key}"


def read(out_of_tree: bool = False, **keys: Any) -> Manifest:
    node = {"name": "chip", "level": "declared", **keys}
    return read_manifest(node, "chip", place, out_of_tree=out_of_tree)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read()
    assert manifest.capabilities.dtypes == ("float32",)
    assert manifest.detect.modules == ()
    assert manifest.announcement() == "platform chip: declared (not hardware-tested)"
    before, now = served_versions("2.1")
    monkeypatch.setattr(manifest_module, "INTERFACE_VERSION", now)
    old = msgspec.structs.replace(manifest, interface=before).announcement()
    assert "written for interfaces 2.0, which the minor after 2.1 will not serve" in old
    assert read(level="hardware-tested").announcement() == "platform chip: hardware-tested"
    claimed = read().announcement("hardware-tested")
    assert "chip: declared (hardware-tested is claimed; no recorded report shows it)" in claimed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"levle": 1}, "chip.yaml:platform.levle: platform.levle: no such key;.*mean 'level'"),
        ({"level": "hardware-test"}, "platform.level: Invalid enum.*mean 'hardware-tested'"),
        ({"name": "other"}, "platform.name is 'other', but the file makes it the option 'chip'"),
        ({"detect": {"module": []}}, "platform.detect.module: no such key.*mean 'modules'"),
        ({"detect": {"modules": "torch"}}, "chip.yaml:platform.detect.modules: .*Expected `array`"),
        ({"detect": []}, "platform.detect: expected a mapping"),
        ({"capabilities": {"dtypes": ["float3"]}}, "capabilities.dtypes: .*mean 'float32'"),
        ({"capabilities": {"graphs": "yes"}}, "capabilities.graphs: Expected `bool`"),
        ({"capabilities": {"ops": ["rmsnorm"]}}, "capabilities.ops: no op.*mean 'rms_norm'"),
        ({"capabilities": {"tensor_parallel": [1.5]}}, "capabilities.tensor_parallel: Expected"),
        ({"capabilities": {"speed": 3}}, "platform.capabilities.speed: no such key"),
        ({"interface": 1.0}, f'1.0 is no version: write "1.0" in quotes; .*{INTERFACE_VERSION}'),
        ({"interface": "two"}, f"'two' is no version: write MAJOR.MINOR.*{INTERFACE_VERSION}"),
        *(({"interface": v}, f"{v!r} is no version: write MAJOR") for v in ("1", "1.0.0", "", 2)),
        ({"interface": [2]}, r"platform.interface: \[2\] is no version"),
        ({"maintainer": []}, "platform.maintainer: Expected `str"),
    ],
)
def test_a_wrong_key_is_refused_with_its_place(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**keys)


def test_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"platform.level: this key is needed"):
        read_manifest({"name": "chip"}, "chip", place)
    with pytest.raises(PortError, match=f"must say which version.*has {INTERFACE_VERSION}"):
        read(out_of_tree=True)
    assert read(out_of_tree=True, interface=INTERFACE_VERSION).interface == INTERFACE_VERSION


@pytest.mark.parametrize("version", ["0.9", "9.0", "1.99", "1.0", "1.1"])
def test_another_version_is_refused_with_both_numbers(version: str) -> None:
    wanted = rf"chip was written for interfaces {version}, this engine has {INTERFACE_VERSION}"
    with pytest.raises(PortError, match=wanted):
        read(interface=version)


def test_the_minor_and_the_one_before_are_served() -> None:
    assert served_versions("1.0") == ["1.0"]
    assert served_versions("1.4") == ["1.3", "1.4"]
    assert served_versions("2.0") == ["2.0"]
    assert is_served("1.3", "1.4")
    assert not is_served("1.5", "1.4")
    assert not is_served("1.2", "1.4")


def test_every_platform_of_ours_has_a_good_manifest() -> None:
    tree = ConfigFiles.find()
    for option, path in tree.options("platform").items():
        if tree.port_of(path) is None:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert read_manifest(values["platform"], option, str).name == option


def test_the_assembly_carries_it_whole() -> None:
    settings = assemble(["platform=cpu", "model=tiny", "loader=dummy"]).settings["platform"]
    assert settings["capabilities"]["head_sizes"] is None
    assert settings["detect"] == {"modules": [], "files": []}


def test_a_wrong_override_is_named() -> None:
    with pytest.raises(ConfigError, match=r"command line: '?platform.level=good.*Invalid enum"):
        assemble(["platform=cpu", "model=tiny", "loader=dummy", "platform.level=good"])


def test_a_simulated_device_is_contract_tested_at_most() -> None:
    asked = ["platform=cpu", "model=tiny", "loader=dummy"]
    assert assemble(asked).platform.level == "runtime-tested"
    simulated = assemble([*asked, "+device.simulated=true"])
    assert simulated.platform.level == "contract-tested"
    assert simulated.server["server"]["level"] == "contract-tested"
    assert simulated.settings["claimed_level"] is None
    lower = assemble([*asked, "+device.simulated=true", "platform.level=declared"])
    assert lower.platform.level == "declared"


def test_a_level_without_a_report_is_a_claim() -> None:
    """What start, ``explain`` and ``/version`` say of a manifest that claims more."""
    asked = ["platform=split_cpu_cpu", "model=tiny", "platform.level=hardware-tested"]
    found = assemble(asked)
    assert (found.platform.level, found.settings["claimed_level"]) == (
        "declared",
        "hardware-tested",
    )
    said = "platform split_cpu_cpu: declared (hardware-tested is claimed;"
    assert found.announcement.startswith(said)
    assert found.server["server"]["level"] == "declared"
    assert found.server["server"]["claimed_level"] == "hardware-tested"
    assert "command line: platform.level=hardware-tested" in found.place("claimed_level")


def test_no_platform_of_ours_claims_more_than_its_reports_show() -> None:
    for option in ConfigFiles.find().options("platform"):
        found = assemble([f"platform={option}", "model=tiny", "model.num_hidden_layers=20"])
        assert found.settings["claimed_level"] is None, option
