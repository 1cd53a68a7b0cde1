"""Classes as a user might bring them: vLLM's own, with their calls counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


def report(worker: Any) -> dict[str, int]:
    """The calls of this process: for ``collective_rpc``."""
    return dict(CALLS)


class CountedImpl(CPUAttentionBackendImpl):
    """Of one layer."""

    def forward(self, *arguments: Any, **more: Any) -> Any:
        CALLS["attention"] += 1
        return super().forward(*arguments, **more)


class CountedAttention(CPUAttentionBackend):
    """Backend of the above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CountedImpl


class CountedRunner(CPUModelRunner):
    """Model runner."""

    def execute_model(self, *arguments: Any, **more: Any) -> Any:
        CALLS["model_runner"] += 1
        return super().execute_model(*arguments, **more)


class CountedWorker(CPUWorker):
    """Worker."""

    def execute_model(self, *arguments: Any, **more: Any) -> Any:
        CALLS["worker"] += 1
        return super().execute_model(*arguments, **more)


class CountedScheduler(AsyncScheduler):
    """Scheduler; it runs in the engine's process."""

    def schedule(self, *arguments: Any, **more: Any) -> Any:
        CALLS["scheduler"] += 1
        return super().schedule(*arguments, **more)


class CountedSampler(Sampler):
    """Sampler."""

    def forward(self, *arguments: Any, **more: Any) -> Any:
        CALLS["sampler"] += 1
        return super().forward(*arguments, **more)


CALLS: Counter[str] = Counter()
