"""A scheduler and cache managers of a port, without the keys that the engine's own have."""

from __future__ import annotations

from vllm_di.components.interfaces import Drafter, KvCacheManager, StructuredOutput
from vllm_di.components.kv_cache_manager.paged import PagedKvCacheManager
from vllm_di.components.messages import WorkerReport
from vllm_di.components.scheduler.continuous import ContinuousScheduler


class Scheduler(ContinuousScheduler):
    def __init__(
        self,
        worker_report: WorkerReport,
        kv_cache_manager: KvCacheManager,
        structured_output: StructuredOutput,
        drafter: Drafter,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        super().__init__(
            worker_report,
            kv_cache_manager,
            structured_output,
            drafter,
            policy="fcfs",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=None,
            max_step_ms=None,
        )


class Shares(PagedKvCacheManager):
    def __init__(self, worker_report: WorkerReport) -> None:
        super().__init__(worker_report, prefix_caching=True)


class SharesNothing(PagedKvCacheManager):
    def __init__(self, worker_report: WorkerReport) -> None:
        super().__init__(worker_report, prefix_caching=False)
