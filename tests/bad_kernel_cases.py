"""Cases that go wrong in every way, for the benchmark's runner of kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from benchmarks.gpu.cases import Case, Table
from benchmarks.gpu.compare import Found, compare


def right(table: Table) -> list[Found]:
    x = torch.ones(3, device=table.device)
    return [compare(x, x, 0.0, 0.0)]


def wrong(_table: Table) -> list[Found]:
    return [compare(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.0, 0.1)]


def raising(_table: Table) -> list[Found]:
    raise RuntimeError("PTX of this kernel is not valid")


def crashing(_table: Table) -> list[Found]:
    os.abort()


def cases() -> Iterator[Case]:
    yield Case("right", right)
    yield Case("wrong", wrong)
    yield Case("crashing", crashing)
    yield Case("raising", raising)
    yield Case("right again", right)
