"""One line to the user, beside the answer."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """To standard error: standard output is for what was asked."""
    print(f"vllm-di: {text}", file=sys.stderr, flush=True)
