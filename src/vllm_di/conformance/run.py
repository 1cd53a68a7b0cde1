"""One run of the suite, from a subject to a report."""

from __future__ import annotations

import datetime
import platform
import shlex
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch

from vllm_di.components.device import system
from vllm_di.components.interfaces import INTERFACE_VERSION
from vllm_di.conformance.catalog import BY_NAME, CHECKS
from vllm_di.conformance.compiling import compiler_class
from vllm_di.conformance.plugin import Conformance
from vllm_di.conformance.report import CheckResult, Report, Required, Waiver, level_of
from vllm_di.conformance.subject import Subject
from vllm_di.containers.evidence import source_commit
from vllm_di.errors import ConfigError, nearest
from vllm_di.report_file import ReportError
from vllm_di.version import __version__

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "transformers", "numpy", "safetensors", "hydra-core", "dependency-injector")
"""Whose versions stand in every report; those of the platform's ``packages`` come on top."""
SEED = 20261124
BETWEEN_ROLES = "handover"
"""The check that a platform of several roles is run through as a whole."""
STEPS: dict[str, tuple[Required, ...]] = {
    "contract": ("declared", "contract"),
    "compile": ("declared", "contract", "compile"),
    "runtime": ("declared", "contract", "runtime"),
}
"""``--level`` to the checks that it runs."""


class Interrupted(KeyboardInterrupt):
    """Somebody ended the run; ``report`` holds what was found until then, and gives no level."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def run(
    subject: Subject,
    *,
    level: str = "runtime",
    only: Sequence[str] = (),
    waivers: Sequence[Waiver] = (),
    quiet: bool = False,
) -> Report:
    """Run the checks up to a level, or ``only`` some checks or cases. Raises ConfigError for a
    name that is none, ReportError when the suite itself cannot run, Interrupted."""
    checks = [check.name for check in CHECKS if check.required in STEPS[level]]
    for name in only:
        if name.split("/")[0] not in BY_NAME:
            raise ConfigError(f"--only {name}: no such check{nearest(name, BY_NAME)}")
    if only:
        asked = {name.split("/")[0] for name in only}
        checks = [name for name in BY_NAME if name in asked]
    _refuse_roles(subject, checks)
    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    plugin = Conformance(subject, checks=checks, only=only, waivers=waivers)
    files = [str(FOLDER / "checks" / f"test_{name}.py") for name in checks]
    options = ["-c", str(FOLDER / "pytest.ini"), "--rootdir", str(FOLDER)]
    options += ["-p", "no:terminal"] if quiet else ["--tb=short"]
    status = pytest.ExitCode(pytest.main([*options, *files], plugins=[plugin]))
    if plugin.errors or status in (
        pytest.ExitCode.INTERNAL_ERROR,
        pytest.ExitCode.USAGE_ERROR,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        raise ReportError("\n".join(plugin.errors) or f"the checks did not run: {status.name}")
    seconds = time.monotonic() - begin
    if status == pytest.ExitCode.INTERRUPTED:
        raise Interrupted(report(subject, plugin, started, seconds, partial=True))
    return report(subject, plugin, started, seconds, partial=bool(only))


def _refuse_roles(subject: Subject, checks: Sequence[str]) -> None:
    """Raise ConfigError for a platform of several roles, with the commands that judge it; what
    lies between the roles is judged as it is."""
    if len(subject.roles) == 1 or list(checks) == [BETWEEN_ROLES]:
        return
    more = [word for folder in subject.config_dirs for word in ("--config-dir", folder)]
    each = {
        shlex.join(["vllm-di", "conform", *stage, *more])
        for stages in subject.roles.values()
        for stage in stages
    }
    whole = ["vllm-di", "conform", *subject.overrides, "--only", BETWEEN_ROLES, *more]
    lines = "\n  ".join([*sorted(each), shlex.join(whole)])
    raise ConfigError(
        f"it has workers of the roles {', '.join(subject.roles)}. The platform of each is judged "
        f"by itself, and then what crosses between them; run\n  {lines}"
    )


def report(
    subject: Subject,
    plugin: Conformance,
    started: datetime.datetime,
    seconds: float,
    *,
    partial: bool,
) -> Report:
    """What a run found so far."""
    checks, manifest = plugin.results(), subject.manifest
    assembly = subject.assembly()
    nodes = {**assembly.server, **assembly.engine}
    workers = [worker for stages in assembly.workers.values() for worker in stages]
    for prefix, worker in zip(subject.stages, workers, strict=True):
        nodes |= {f"{prefix}{slot}": node for slot, node in worker.items()}
    return Report(
        platform=manifest.name,
        level=level_of(checks, partial=partial, simulated=subject.simulated),
        partial=partial,
        form=subject.form,
        simulated=subject.simulated,
        started=started,
        seconds=round(seconds, 1),
        overrides=subject.overrides,
        config_hash=subject.config_hash,
        interface_version=INTERFACE_VERSION,
        port_interface=manifest.interface or INTERFACE_VERSION,
        seed=subject.seed,
        device=device_name(subject),
        versions=versions(subject) | _compilers(subject, checks),
        capabilities={k: getattr(manifest.capabilities, k) for k in _fields(manifest)},
        components={slot: str(node["_target_"]) for slot, node in nodes.items()},
        waivers=list(plugin.waivers),
        checks=checks,
    )


def device_name(subject: Subject) -> str:
    """The hardware: the accelerator's own name, or the processor's where the host computed."""
    if subject.simulated or subject.lacks_driver:
        return system.cpu_name()
    with subject.parts("device") as container:
        device = container.device()
        if device.on_host:
            return system.cpu_name()
        module = torch.get_device_module(device.torch_device)
    named = getattr(module, "get_device_name", None)
    return str(named()) if named else device.torch_device.type


def versions(subject: Subject) -> dict[str, str]:
    """Of this project, its packages and the port's, of Python, the system and the source tree."""
    found = {"vllm-di": __version__, "python": platform.python_version()}
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    distributions = metadata.packages_distributions()
    names = [*PACKAGES]
    for package in subject.manifest.packages:
        names += distributions.get(package, [])
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    if commit := source_commit():
        found["commit"] = commit
    return found


def _compilers(subject: Subject, checks: Sequence[CheckResult]) -> dict[str, str]:
    """Versions of what compiled, where something did."""
    compiled = any(check.name == "compile" and check.outcome == "pass" for check in checks)
    return dict(compiler_class(subject).versions()) if compiled else {}


def _fields(manifest: object) -> list[str]:
    return list(manifest.capabilities.__struct_fields__)  # type: ignore[attr-defined]
