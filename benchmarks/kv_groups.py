"""KV cache of one long sequence in a model with sliding windows, as a share of what one block table
for all layers would hold. Counted in blocks, without a model.

    python -m benchmarks.kv_groups
"""

from __future__ import annotations

from vllm_di.components.interfaces import Prefix
from vllm_di.components.kv_cache_manager.paged import PagedKvCacheManager
from vllm_di.components.kv_groups import Groups, group_layers
from vllm_di.components.messages import KvSpec, LimitsReport, WorkerReport

PROMPT, CHUNK, BLOCK, WINDOW, EVERY = 32_768, 2_048, 16, 512, 6
"""The shape of a Gemma 3: one layer in six sees all tokens."""


def main() -> None:
    for layers in (24, 26, 48):
        specs = [_spec(i) for i in range(layers)]
        groups = group_layers([specs])
        places = len(Groups(specs, groups).pool)
        most = _most_blocks(specs, PROMPT // BLOCK * layers) * places
        short = sum(group.most_blocks(BLOCK, CHUNK, BLOCK) for group in groups) * places
        print(
            f"{layers} layers in {len(groups)} groups: {most / (PROMPT // BLOCK * layers):.1%} of "
            f"one table's blocks for {PROMPT:,} tokens, {short / layers:.1%} for a short prompt"
        )


def _most_blocks(specs: list[KvSpec], num_blocks: int) -> int:
    """Blocks held at most while the prompt runs in chunks."""
    manager = PagedKvCacheManager(_report(specs, num_blocks), prefix_caching=True)
    prefix = Prefix(list(range(PROMPT)))
    manager.admit(1, prefix, lambda cached: CHUNK)
    most = num_blocks - manager.num_free_blocks
    for done in range(CHUNK, PROMPT, CHUNK):
        manager.commit(1, prefix.token_ids, done)
        assert manager.allocate(1, done + CHUNK, done) is not None
        most = max(most, num_blocks - manager.num_free_blocks)
    return most


def _spec(layer: int) -> KvSpec:
    if layer % EVERY == EVERY - 1:
        return KvSpec(layer=layer, num_kv_heads=1, head_size=256)
    return KvSpec(layer=layer, num_kv_heads=1, head_size=256, kind="sliding", window=WINDOW)


def _report(specs: list[KvSpec], num_blocks: int) -> WorkerReport:
    return WorkerReport(
        block_size=BLOCK,
        kv_specs=specs,
        limits=LimitsReport(),
        max_model_len=PROMPT,
        vocab_size=1,
        eos_token_ids=[],
        device="none",
        dtype="bfloat16",
        weight_bytes=0,
        num_blocks=num_blocks,
        kv_groups=group_layers([specs]),
    )


if __name__ == "__main__":
    main()
