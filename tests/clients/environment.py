"""An environment for each client under test: ``python -m tests.clients.environment [NAME...]``
makes ``.clients/NAME`` (100 MB each). They need nothing of this project: a client has its base URL
and nothing else.

    python = interpreter("litellm")
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".clients"
CLIENTS = {
    "openai": ["openai==3.54.0"],
    "anthropic": ["anthropic==2.12.0"],
    "langchain": ["langchain-openai==1.7.4"],
    "litellm": ["litellm==1.110.2"],
    "instructor": ["instructor==1.17.0"],
    "pydantic_ai": ["pydantic-ai-slim[openai]==2.68.0"],
    "schemathesis": ["schemathesis==4.32.5"],
}
"""Pinned: a newer release is tried on purpose, not by chance."""


def interpreter(name: str) -> Path:
    """The environment's Python; made first where it is missing or has other versions. Raises
    CalledProcessError."""
    folder, wanted = HOME / name, "\n".join(CLIENTS[name])
    python, done = folder / "bin/python", folder / ".done"
    if not done.is_file() or done.read_text() != wanted:
        sys.stderr.write(f"setting up {wanted} in {folder}\n")
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "--quiet", "install", *CLIENTS[name]], check=True)
        done.write_text(wanted)
    return python


if __name__ == "__main__":
    for one in sys.argv[1:] or CLIENTS:
        interpreter(one)
