"""What torch keeps of graphs that were made."""

from __future__ import annotations

import linecache

import torch
from torch.fx import graph_module, symbolic_trace

from vllm_di.components.program.sources import sources_dropped


def test_the_sources_of_the_block_are_dropped_and_no_others() -> None:
    before = symbolic_trace(torch.nn.ReLU())
    name = before.forward.__code__.co_filename
    kept = graph_module._loader.eval_cache
    count = len(kept)
    with sources_dropped():
        made = symbolic_trace(torch.nn.ReLU())
        assert len(kept) > count
        assert linecache.getlines(made.forward.__code__.co_filename)
    assert len(kept) == count and name in kept
    assert not linecache.getlines(made.forward.__code__.co_filename)
    assert made(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
