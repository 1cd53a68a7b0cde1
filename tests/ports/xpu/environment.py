"""An environment with Intel's Triton, compiler and OpenCL runtime, none of which needs a GPU:
``python -m tests.ports.xpu.environment`` (``make xpu-env``) makes ``.xpu``. 2.7 GB, two minutes.

    .xpu/bin/vllm-di conform platform=xpu --only compile

Intel's Triton and the pinned one are both named ``triton``, hence an environment of its own. The
only release of Intel's on PyPI is older than what this project supports and asks a driver which GPU
is there: two edits of the installed files mend that. They are of this environment alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[3]
HOME = ROOT / ".xpu"
PYTHON = HOME / "bin/python"
PACKAGES = (
    "triton-xpu==3.3.0b1",
    "intel-opencl-rt==2026.2.0",
    "intel-cmplr-lib-rt==2026.2.0",  # whose mathematics the former loads
    "pyopencl==2026.1.4",
    "pytest-timeout>=2.4",
    "hypothesis>=6.150",
)
TORCH = "torch==2.13.0"

SUITE = "sid"
"""The one suite of Debian that has a compiler which knows Xe2. Its versions move: the report names
the one that ran."""
DEBIAN = ("intel-ocloc", "libigc2", "libigdfcl2", "libc6", "libstdc++6", "libgcc-s1", "zlib1g")
"""The compiler, with the C library that it was built for: nothing of it is installed, and no
package of the machine is touched."""
OCLOC = """#!/bin/sh
# written by tests/ports/xpu/environment.py: Debian's ocloc with its own C library
home=$(dirname "$(dirname "$(readlink -f "$0")")")/debian
libraries=$home/usr/lib/x86_64-linux-gnu
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$home"/usr/bin/ocloc-* "$@"
"""

KNOBS = '''"""In place of ``triton.knobs``, which Triton 3.4 brought: the one that is asked for."""

import os
from types import SimpleNamespace

runtime = SimpleNamespace(interpret=os.environ.get("TRITON_INTERPRET") == "1")
'''
ARCHITECTURE = """        mod = compile_module_from_src(Path(os.path.join(dirname, "arch_parser.c")).read_text(), "arch_utils")
        self.device_arch = mod.parse_device_arch(target.arch.get('architecture', 0))
"""  # noqa: E501
NO_ARCHITECTURE = "        self.device_arch = ''\n"
"""Its parser of architectures is compiled with SYCL's headers. Without one, the properties of the
target hold as they are given."""


def make() -> None:
    """Raises CalledProcessError, and ValueError where an edit does not fit the package."""
    if (HOME / ".done").is_file():
        return
    sys.stderr.write(f"setting up Intel's Triton in {HOME}\n")
    venv.create(HOME, with_pip=True)
    _pip("install", TORCH)
    _pip("install", "-e", f"{ROOT}[conformance]", TORCH, *PACKAGES)
    [triton] = HOME.glob("lib/python3*/site-packages/triton")
    (triton / "knobs.py").write_text(KNOBS)
    _edit(triton / "backends/intel/compiler.py", ARCHITECTURE, NO_ARCHITECTURE)
    compiler()
    (HOME / ".done").touch()


def compiler() -> None:
    """Debian's ocloc, unpacked beside the environment, unless the machine has one. Where there is
    no Debian to take it from, says so: kernels are then compiled to SPIR-V and no further."""
    if shutil.which("ocloc"):
        return
    mirror = _mirror()
    if mirror is None:
        sys.stderr.write("no Debian here: put ocloc on the PATH (Intel's package intel-ocloc)\n")
        return
    apt, debian = HOME / "apt", HOME / "debian"
    for folder in (apt / "lists/partial", apt / "cache/archives/partial", apt / "debs", debian):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(f"deb {mirror} {SUITE} main\n")
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    subprocess.run(["apt-get", "-qq", *given, "update"], check=True)
    subprocess.run(["apt-get", "-qq", *given, "download", *DEBIAN], check=True, cwd=apt / "debs")
    for package in sorted((apt / "debs").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(debian)], check=True)
    shutil.rmtree(apt)
    script = HOME / "bin/ocloc"
    script.write_text(OCLOC)
    script.chmod(0o755)


def _mirror() -> str | None:
    """Debian's archive as this machine's apt knows it."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return next((uri for uri in found if "security" not in uri), None)


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file}: the text to replace stands there {text.count(old)} times")
    file.write_text(text.replace(old, new))


def _pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", "--quiet", *arguments]
    subprocess.run(command, check=True, env={**os.environ})


if __name__ == "__main__":
    make()
