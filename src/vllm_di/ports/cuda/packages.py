"""Packages that a component needs and the project does not bring."""

from __future__ import annotations

import importlib
from typing import Any

from vllm_di.errors import PortError


def needed(package: str, option: str, install: str) -> Any:
    """The package. Raises PortError that says why it cannot be had and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "is not installed" if missing else f"cannot be imported: {error}"
        raise PortError(f"{option}: the package {package} {why}; {install}") from error
