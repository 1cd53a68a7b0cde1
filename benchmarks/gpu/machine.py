"""What the machine is: versions beside what pyproject.toml asks for, the device, one kernel."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.processes import ROOT, Rows
from vllm_di.version import __version__

TOOLS = ("triton", "pytest", "pytest-timeout", "accelerate")


def facts(device: str) -> dict[str, str]:
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", platform.processor)()
    return {
        "device": name,
        "torch": torch.__version__,
        "runtime": str(torch.version.cuda),
        "python": platform.python_version(),
        "vllm-di": __version__,
        "processors": str(os.cpu_count()),
    }


def requirements() -> dict[str, dict[str, Any]]:
    """Of each dependency: what is asked for, what is there, whether that fits."""
    from packaging.requirements import Requirement

    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {}
    for requirement in map(Requirement, [*asked, *TOOLS]):
        try:
            there = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            there = ""
        fits = bool(there) and requirement.specifier.contains(there, prereleases=True)
        asks = str(requirement.specifier) or "any"
        found[requirement.name] = {"asked": asks, "there": there or "absent", "fits": fits}
    return found


def properties(device: str) -> dict[str, Any]:
    if torch.device(device).type != "cuda":
        return {}
    told = torch.cuda.get_device_properties(0)
    names = [name for name in dir(told) if not name.startswith("_")]
    values = {name: getattr(told, name) for name in names}
    return {name: v for name, v in values.items() if isinstance(v, int | float | str)}


def driver() -> str:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        words = ["nvidia-smi", f"--query-gpu={query},compute_mode,mig.mode.current", "--format=csv"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"
    return (done.stdout + done.stderr).strip()


def first_kernel(device: str) -> str:
    """'' when a Triton kernel compiles, runs and is right; else why not."""
    from benchmarks.gpu.cases import Table

    table = Table(device)
    x, weight = torch.ones(3, 64, device=device), torch.full((64,), 2.0, device=device)
    got = table.ops.rms_norm(x, weight, 0.0)
    return "" if torch.allclose(got.cpu(), torch.full((3, 64), 2.0)) else f"{got[0, :4]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when there is no device that torch can use."""
    parser = argparse.ArgumentParser(description="what the machine is")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    row = Rows(options.out)
    needed = requirements()
    row(name="requirements", passed=all(one["fits"] for one in needed.values()), found=needed)
    row(name="driver", found=driver())
    usable = True
    for name, call in (
        ("facts", facts),
        ("properties", properties),
        ("first kernel", first_kernel),
    ):
        try:
            found = call(options.device)
            wrong = name == "first kernel" and bool(found)
            row(name=name, passed=not wrong, found=found)
        except Exception as error:  # a driver raises what it likes
            trace = traceback.format_exc()[-4000:]
            row(name=name, passed=False, error=f"{type(error).__name__}: {error}", trace=trace)
            usable &= name == "first kernel"
    return int(not usable)


if __name__ == "__main__":
    sys.exit(main())
