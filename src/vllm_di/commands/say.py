"""One line to the user, beside the answer."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def say(text: str) -> None:
    """To standard error: standard output is for what was asked."""
    print(f"vllm-di: {text}", file=sys.stderr, flush=True)


def warn(texts: Iterable[str]) -> None:
    """What is wrong and does not stop this command."""
    for text in texts:
        say(f"warning: {text}")
