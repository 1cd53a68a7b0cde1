"""A model that reads its context back from the KV cache, so that nothing but the right block, slot
and position gives the right token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    KvLayout,
    LayerCache,
    Model,
    ModelStep,
    PlanShape,
    ShapePolicy,
)
from vllm_di.components.messages import KvSpec
from vllm_di.components.shapes.padding import pad_tokens

VOCAB = 97


def next_token(context: Sequence[int], vocab_size: int = VOCAB) -> int:
    """What the model makes likeliest: a hash of every token and its place."""
    value = 7
    for position, token in enumerate(context):
        value = (value * 31 + token * 17 + position) % 1_000_003
    return value % vocab_size


def expected_logits(context: Sequence[int], vocab_size: int = VOCAB) -> Tensor:
    """[vocab]: falls with the distance, upwards and around, from the likeliest token."""
    away = (torch.arange(vocab_size) - next_token(context, vocab_size)) % vocab_size
    return -0.1 * away.float()


class PlanAttention(AttentionBackend):
    """Hands the plan through: the fake model does the rest."""

    layouts: ClassVar[tuple[str, ...]] = ("*",)

    def build(self, batch: BatchPlan, out: Any | None = None) -> BatchPlan:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        raise AssertionError("the fake model attends on its own")


class CountingModel(Model):
    """Base of fakes: sizes, and no weights."""

    def __init__(self, vocab_size: int = VOCAB, max_model_len: int = 256) -> None:
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.eos_token_ids, self.dtype, self.hidden_size = [0], torch.float32, 1
        self.loaded_with: int | None = None

    def kv_specs(self) -> list[KvSpec]:
        return [KvSpec(layer=0, num_kv_heads=1, head_size=1)]

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        raise AssertionError("fakes have no checkpoint")

    def load_random(self, seed: int) -> None:
        self.loaded_with = seed

    def forward(self, step: ModelStep) -> Tensor:
        raise AssertionError("not run")

    def logits(self, hidden: Tensor) -> Tensor:
        raise AssertionError("not run")


class EchoModel(CountingModel):
    """Keys are token ids, values are positions; the hidden state is the next token's id."""

    def __init__(self, layout: KvLayout, max_model_len: int = 256) -> None:
        super().__init__(max_model_len=max_model_len)
        self._layout = layout
        self.batches: list[int] = []
        self.broken: set[int] = set()
        """A token whose row has NaN logits."""

    def forward(self, step: ModelStep) -> Tensor:
        token_ids, positions, cache = step.token_ids, step.positions, step.caches[0]
        plan: BatchPlan = step.metadata[0]
        tokens = len(token_ids)
        self.batches.append(tokens)
        assert len(positions) == len(plan.slot_mapping) == tokens
        assert plan.query_start.tolist()[0] == 0
        assert int(positions.max()) < self.max_model_len
        assert int(plan.seq_lens.max()) <= self.max_model_len
        assert plan.block_table.stride(-1) == 1
        keys, values = (x.float().view(tokens, 1, 1) for x in (token_ids, positions))
        self._layout.write(cache, keys, values, plan.slot_mapping)
        hidden = torch.full((tokens, 1), -1.0)
        bounds = plan.query_start.tolist()
        for row, length in enumerate(plan.seq_lens.tolist()):
            start, end = bounds[row], bounds[row + 1]
            assert plan.query_lens_host[row] == end - start
            assert plan.seq_lens_host[row] == length
            read, places = self._layout.gather(cache, plan.block_table[row], length)
            context = [int(t) for t in read.flatten().tolist()]
            if plan.slot_mapping[start] >= 0:
                assert places.flatten().tolist() == list(range(length))
            for at in range(start, end):
                seen = length - (end - 1 - at)
                assert int(positions[at]) == seen - 1
                hidden[at] = next_token(context[:seen])
                if int(token_ids[at]) in self.broken:
                    hidden[at] = float("nan")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return -0.1 * ((torch.arange(VOCAB) - hidden) % VOCAB)


class Eights(ShapePolicy):
    """Pads to multiples of eight, as a device with fixed shapes does."""

    def pad(self, plan: BatchPlan) -> BatchPlan:
        return pad_tokens(plan, -(-len(plan.token_ids) // 8) * 8)

    def warm_up_plans(
        self, largest: PlanShape, blank: Callable[[PlanShape], BatchPlan]
    ) -> Iterator[BatchPlan]:
        for tokens in (min(8, largest.queries), largest.queries):
            yield self.pad(blank(PlanShape(tokens, rows=1, seqs=1, columns=1, queries=tokens)))
        yield self.pad(blank(PlanShape(largest.seqs, largest.seqs, largest.seqs, 1, 1)))
