"""One cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.ray.nodes import TINY, Nodes, reason_against, two_nodes


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    if why := reason_against():
        pytest.skip(why)
    with two_nodes() as found:
        yield found


@pytest.fixture(scope="session")
def want(nodes: Nodes) -> Any:
    """The tokens of one worker on one host."""
    return nodes.ask({"overrides": TINY})[0]["tokens"]
