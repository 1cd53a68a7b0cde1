"""Where the package nixl is there: ``make test-nixl``."""

from __future__ import annotations

from importlib import util

import pytest

needs_nixl = pytest.mark.skipif(
    util.find_spec("nixl") is None, reason="the package nixl is not installed: make test-nixl"
)
