"""What a served engine says of its platform: at the start, and in ``/version``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx

from vllm_di.components.interfaces import INTERFACE_VERSION


def test_the_level_is_said(tmp_path: Path) -> None:
    socket = tmp_path / "api"
    asked = ["platform=cpu", "ops=torch", "model=tiny", "platform.level=contract-tested"]
    command = [sys.executable, "-m", "vllm_di.cli", "serve", *asked, f"server.unix_socket={socket}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        try:
            said = next(line for line in served.stderr if "platform" in line)
            assert "platform cpu: contract-tested (not hardware-tested)" in said
            assert any("listening" in line for line in served.stderr)
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
                found = client.get("http://engine/version").json()
        finally:
            served.terminate()
    wanted = {"platform": "cpu", "level": "contract-tested", "interface": INTERFACE_VERSION}
    assert found.items() >= wanted.items()
