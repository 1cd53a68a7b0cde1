"""Shapes of steps for Spyre: prompts by whole blocks."""

from __future__ import annotations

from vllm_di.components.interfaces import BatchPlan, KvLayout, Model, PlanShape, SchedulerLimits
from vllm_di.components.shapes.grid import GridShapes
from vllm_di.components.shapes.padding import pad_to
from vllm_di.components.shapes.sizes import Count
from vllm_di.errors import ConfigError
from vllm_di.ports.spyre.kv_layout import BLOCK


class SpyreShapes(GridShapes):
    """As GridShapes, for one prompt at a time whose rows end where a block ends: its tokens, those
    that are missing in its last block, and whole blocks before them up to a size of
    ``prefill_queries``. A chunk may begin inside a block, which takes one block more."""

    def __init__(
        self,
        model: Model,
        kv_layout: KvLayout,
        limits: SchedulerLimits,
        *,
        decode_seqs: list[Count],
        prefill_queries: list[Count],
        columns: list[Count],
        max_num_seqs: Count,
        max_num_batched_tokens: Count,
    ) -> None:
        report = limits.report()
        if report.max_prefill_rows != 1 or not report.null_block:
            raise ConfigError(
                "shapes=spyre prefills one prompt at a time and pads into block 0; set "
                "limits.max_prefill_rows=1 limits.null_block=true"
            )
        for size in prefill_queries:
            if size % BLOCK:
                raise ConfigError(
                    f"prefill_queries: {size} is no multiple of {BLOCK}; take "
                    f"{-(-size // BLOCK) * BLOCK}"
                )
        longest = min(max_num_batched_tokens, model.max_model_len)
        needed = min(-(-longest // BLOCK) * BLOCK + BLOCK, -(-model.max_model_len // BLOCK) * BLOCK)
        largest = max(prefill_queries, default=0)
        if largest < needed:
            raise ConfigError(
                f"prefill_queries: a chunk of {longest} tokens that begins inside a block takes "
                f"{needed} rows, and the largest size is {largest}; add {needed}, or lower "
                "scheduler.max_num_batched_tokens"
            )
        super().__init__(
            model,
            kv_layout,
            limits,
            decode_seqs=decode_seqs,
            prefill_seqs=[1],
            prefill_queries=prefill_queries,
            columns=columns,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=needed,  # its rows, not its tokens, say which sizes are in use
        )

    def pad(self, plan: BatchPlan) -> BatchPlan:
        found = plan.shape
        if found.queries <= 1:
            return super().pad(plan)
        if found.seqs > 1:
            raise ValueError(f"{found}: a step is one prompt, or decodes of one token each")
        columns = self._columns.over(found.columns)
        past = plan.seq_lens_host[0] - plan.query_lens_host[0]
        end = -(-plan.seq_lens_host[0] // BLOCK) * BLOCK
        rows = self._queries.over(end - past)
        shape = PlanShape(rows, rows if found.rows > 1 else 1, 1, columns, rows)
        return pad_to(plan, shape, self._slot)
