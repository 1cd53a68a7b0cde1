"""Ray itself, with its token authentication on: nothing of ours joins a cluster without it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

from vllm_di.errors import ConfigError, one_line

ON_THE_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray would have a cluster of one host on the address that leads to the internet. It asks this when
it is imported, on Linux too."""
PROBE_SECONDS = 60.0
PROBE = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)
"""
"""Ends with status 0 where a cluster answers somebody without its token."""


def imported(*, is_alone: bool) -> Any:
    """Ray, with what it has to know before; ``is_alone``: on this host alone. Raises ConfigError
    where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if is_alone:
        os.environ.update(ON_THE_LOOPBACK)
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"executor=ray needs the package ray: pip install 'vllm-di[ray]' ({one_line(error)})"
        ) from None


def authenticate(token_file: str | None) -> None:
    """Let Ray, in this process and in those that it starts, want and show a token. Ray has no
    other switch for it than its environment, which it reads once: so it is made to read again."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if token_file is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # would win
        os.environ["RAY_AUTH_TOKEN_PATH"] = token_file
    raylet = importlib.import_module("ray._raylet")
    try:
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    except AttributeError as error:
        raise ConfigError(
            f"executor=ray needs a Ray with token authentication, 2.52 or later ({one_line(error)})"
        ) from None


def refuse_open(address: str) -> None:
    """Raises ConfigError for a cluster that takes orders from anybody."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, address],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"cluster.address: Ray does not answer at {address}", key="cluster.address"
        ) from None
    if done.returncode == 0:
        raise ConfigError(
            f"cluster.address: the cluster at {address} takes orders without a token: anybody "
            "who reaches its ports can run code there. Start it with RAY_AUTH_MODE=token on "
            "every node",
            key="cluster.address",
        )
    said = done.stderr.lower()
    if "auth" not in said and "token" not in said:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise ConfigError(
            f"cluster.address: whether {address} wants a token cannot be told: {last[:300]}",
            key="cluster.address",
        )
