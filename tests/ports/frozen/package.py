"""The frozen port as a package, and the hash that keeps it as it is.

    python -m tests.ports.frozen.package

writes the hash of its files to ``2_0.sha256``: from then on the port may not be edited.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports.packages import installed

HERE = Path(__file__).parent
PORT = HERE / "2_0"
HASH = HERE / "2_0.sha256"
NAME = "frozen_2_0"


def files(port: Path = PORT) -> dict[str, str]:
    """Path in the package to text, the package's own first; without the README."""
    found = [p for p in port.rglob("*") if p.suffix in (".py", ".yaml", ".toml")]
    found.sort(key=lambda p: (p.suffix != ".py", p))
    return {str(p.relative_to(port)): p.read_text(encoding="utf-8") for p in found}


def digest(port: Path = PORT) -> str:
    """SHA-256 of all names and texts."""
    text = "".join(f"{name}\0{text}\0" for name, text in sorted(files(port).items()))
    return hashlib.sha256(text.encode()).hexdigest()


def freeze(target: Path = HASH, port: Path = PORT) -> None:
    """Write the hash."""
    target.write_text(f"{digest(port)}\n", encoding="utf-8")


@contextmanager
def frozen_port(site: Path) -> Iterator[None]:
    """It is installed in ``site``, and on this process's path."""
    with installed(site, files(), name="vllm_di_frozen_2_0", port=NAME):
        yield


if __name__ == "__main__":
    freeze()
