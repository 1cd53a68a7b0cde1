"""``make gpu-bundle``: a folder that runs ``python -m benchmarks.gpu`` on a machine that has no
network.

Wheels of what the project needs and that machine lacks, the project's tracked files, ``run.sh``.
The machine is described by parameters: Python's version, the platform of wheels, and the names of
the packages that are there (of these nothing is fetched, not even the version is known: the run's
first part says whether they fit).
"""

from __future__ import annotations

import argparse
import email
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
THERE = """
    torch triton transformers safetensors numpy tokenizers jinja2 pyyaml rich prometheus-client
    pytest pytest-timeout hypothesis httpx psutil accelerate packaging tqdm requests h11 click
    anyio typing-extensions markupsafe pygments markdown-it-py idna
"""
"""Of a usual image for work with torch."""
NEWEST_GLIBC = 39
MOST_MIB = 60
RUN = """\
#!/usr/bin/env bash
# Installs the wheels into a folder of their own, and runs the benchmark from the project here.
#     bash run.sh [FOLDER FOR RESULTS] [more arguments of benchmarks.gpu]
set -u
here=$(cd "$(dirname "$0")" && pwd)
results=$(mkdir -p "${1:-results}" && cd "${1:-results}" && pwd)
shift || true
work=$(mktemp -d)
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \\
  --target "$work/site" "$here"/wheels/*.whl || exit 2
project="$here/project"
export PYTHONPATH="$work/site:$project/src:$project${PYTHONPATH:+:$PYTHONPATH}"
export XDG_CACHE_HOME="$work/cache"
cd "$project" || exit 2
keep() {  # also when it is cut off
  tar -C "$work" -czf "$results/logs.tar.gz" logs
  cp "$work/logs/conformance.json" "$results/" 2>/dev/null || true
}
trap keep EXIT
trap 'exit 130' INT TERM
"$python" -m benchmarks.gpu --json "$results/gpu.json" --logs "$work/logs" "$@" &
wait $!
"""


@dataclass(frozen=True)
class Target:
    """The machine that has no network."""

    python: str
    """``3.12``"""
    machine: str
    """``x86_64``"""
    there: frozenset[str]
    """Canonical names of its packages."""

    def environment(self) -> dict[str, str]:
        """Of requirements' markers."""
        found: dict[str, str] = {**default_environment()}  # type: ignore[dict-item]
        more = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        more |= {"platform_machine": self.machine, "platform_system": "Linux"}
        return found | more | {"sys_platform": "linux", "os_name": "posix", "extra": ""}

    def options(self) -> Iterator[str]:
        """Of pip: wheels that this machine runs."""
        yield from ("--python-version", self.python, "--implementation", "cp")
        for minor in range(NEWEST_GLIBC, 4, -1):
            yield from ("--platform", f"manylinux_2_{minor}_{self.machine}")
        for old in ("manylinux2014", "manylinux2010", "manylinux1", "linux"):
            yield from ("--platform", f"{old}_{self.machine}")


def collect(target: Target, folder: Path, constraints: Path) -> list[Path]:
    """The wheels that it lacks, requirements of requirements included."""
    folder.mkdir(parents=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    found: dict[str, Path] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        fits = requirement.marker is None or requirement.marker.evaluate(target.environment())
        if name in target.there or name in found or not fits:
            continue
        found[name] = wheel = fetch(requirement, target, folder, constraints)
        waiting += needs(wheel)
    return sorted(found.values())


def fetch(requirement: Requirement, target: Target, folder: Path, constraints: Path) -> Path:
    """Its wheel; one that is built here where only a source of pure Python is to be had."""
    text = f"{requirement.name}{requirement.specifier}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    common = ["--no-deps", "--quiet", "-c", str(constraints)]
    with tempfile.TemporaryDirectory() as there:
        words = ["download", *common, "--only-binary", ":all:", *target.options(), "-d", there]
        done = subprocess.run([*pip, *words, text], capture_output=True, text=True, check=False)
        if done.returncode:
            words = ["wheel", *common, "-w", there]
            subprocess.run([*pip, *words, text], check=True)
        (wheel,) = Path(there).glob("*.whl")
        tags = parse_wheel_filename(wheel.name)[3]
        if done.returncode and not any(tag.platform == "any" for tag in tags):
            raise SystemExit(
                f"{text}: there is no wheel for Python {target.python}, and what was built here "
                f"runs here alone: {wheel.name}\n{done.stderr}"
            )
        return Path(shutil.move(wheel, folder / wheel.name))


def needs(wheel: Path) -> list[Requirement]:
    """What a wheel says that it needs; its extras are left out by their markers."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(archive.read(name))
    return [Requirement(text) for text in told.get_all("Requires-Dist") or []]


def copy_project(folder: Path) -> None:
    """Tracked files, and those that would be, as they are; beside them the last commit alone, which
    a report of the conformance suite names."""
    clone = ["git", "clone", "--quiet", "--depth", "1", "--no-checkout", ROOT.as_uri(), str(folder)]
    subprocess.run(clone, check=True)
    subprocess.run(["git", "-C", str(folder), "remote", "remove", "origin"], check=True)
    subprocess.run(["git", "-C", str(folder), "reset", "--quiet"], check=True)
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def size(folder: Path) -> float:
    """MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="wheels and the project in one folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-bundle")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--there", default=THERE, help="packages that the machine has")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args(arguments)
    names = frozenset(canonicalize_name(name) for name in options.there.split())
    target = Target(options.python, options.machine, names)
    if options.folder.exists():
        shutil.rmtree(options.folder)
    wheels = collect(target, options.folder / "wheels", options.constraints)
    copy_project(options.folder / "project")
    (options.folder / "run.sh").write_text(RUN)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    whole = size(options.folder)
    print(f"{whole:7.2f} MiB  {options.folder}, with the project")
    if whole > MOST_MIB:
        print(f"more than {MOST_MIB} MiB: name more packages with --there", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
