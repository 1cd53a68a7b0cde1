"""The native decoder against transformers: the same logits, however the tokens are fed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.checkpoints import CASES, make
from tests.models.runner import load

TOKENS = [(7 * i * i + 3 * i) % 97 + 1 for i in range(70)]
BOUND = 1e-4
"""Largest difference of logits in fp32, relative to their size: sums run in another order."""


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = make(case, tmp_path)
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0]
    bound = BOUND * max(1.0, float(want.abs().max()))
    running = load(tmp_path)
    whole = running.feed(TOKENS)
    assert float((whole - want).abs().max()) < bound
    kernels = load(tmp_path, ops_name="cpu", attention_name="paged")
    # a chunk that ends inside a block, one that crosses blocks, then token by token
    parts = [TOKENS[:19], TOKENS[19:61], *([t] for t in TOKENS[61:])]
    chunked = torch.cat([kernels.feed(part) for part in parts])
    assert float((chunked - want).abs().max()) < bound
