"""A port in a package of its own: built as a wheel, installed by pip, used with no change here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.ports.packages import FILES, build_wheel, install


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_di.cli", *arguments]
    env = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    install(site, build_wheel(tmp_path, FILES))
    return site


def test_it_serves_through_the_port(site: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    asked = ["complete", "hello", "model=tiny", "model.dtype=float32", "--max-tokens", "4"]
    plain = run(site, *asked, "platform=cpu")
    assert plain.returncode == 0, plain.stderr
    logs = f"attention.log={log}", f"communicator.log={log}"
    ported = run(site, *asked, "platform=mychip", *logs)
    assert ported.returncode == 0, ported.stderr
    assert ported.stdout == plain.stdout
    calls = log.read_text().split()
    assert calls.count("communicator") == 1
    assert calls.count("attention") >= 4


def test_explain_shows_the_package(site: Path) -> None:
    done = run(site, "explain", "--json", "platform=mychip", "model=tiny")
    assert done.returncode == 0, done.stderr
    row = next(r for r in json.loads(done.stdout)["rows"] if r["slot"] == "attention")
    assert row["target"] == "mychip.provider.MyChipAttention"
    assert (row["chosen_by"], row["version"]) == ("platform", "1.0")
    assert row["place"].endswith("platform/mychip.yaml:4")


def test_the_users_choice_beats_the_port(site: Path) -> None:
    done = run(site, "explain", "--json", "platform=mychip", "model=tiny", "attention=sdpa")
    row = next(r for r in json.loads(done.stdout)["rows"] if r["slot"] == "attention")
    assert row["target"].endswith("SdpaAttention")
    assert row["chosen_by"] == "command line"


def test_no_code_of_a_port_runs_before_it_is_named(tmp_path: Path) -> None:
    loud = FILES | {"mychip/__init__.py": "raise RuntimeError('imported')\n"}
    install(tmp_path / "site", build_wheel(tmp_path, loud))
    done = run(tmp_path / "site", "explain", "--json", "platform=cpu", "model=tiny")
    assert done.returncode == 0, done.stderr


def test_a_port_that_fails_to_load_is_named(tmp_path: Path) -> None:
    needy = FILES | {"mychip/provider.py": "import mychip_driver\n"}
    install(tmp_path / "site", build_wheel(tmp_path, needy))
    done = run(tmp_path / "site", "complete", "hello", "platform=mychip", "model=tiny")
    assert done.returncode == 2
    assert "'mychip_driver', which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_packages_with_one_name_are_refused(tmp_path: Path) -> None:
    other = {f"rival{k.removeprefix('mychip')}": v for k, v in FILES.items()}
    wheels = build_wheel(tmp_path, FILES), build_wheel(tmp_path, other, "rival_port")
    install(tmp_path / "site", *wheels)
    done = run(tmp_path / "site", "config", "show", "platform=cpu", "model=tiny")
    assert done.returncode == 0
    assert "warning: port 'mychip' (mychip_port and rival_port) cannot be used" in done.stderr
    done = run(tmp_path / "site", "config", "show", "platform=mychip", "model=tiny")
    assert done.returncode == 2
    assert "port 'mychip' (mychip_port and rival_port) is installed but two packages" in done.stderr
