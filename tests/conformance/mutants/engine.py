"""Cache managers, schedulers, executors, graphs, loaders and runners with a flaw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_di.components.executor.inline import InlineExecutor
from vllm_di.components.graph.eager import EagerGraph
from vllm_di.components.interfaces import (
    BatchPlan,
    Model,
    ModelStep,
    Prefix,
    StepFunction,
)
from vllm_di.components.kv_cache_manager import paged
from vllm_di.components.kv_cache_manager.paged import PagedKvCacheManager
from vllm_di.components.loader.safetensors import SafetensorsLoader
from vllm_di.components.messages import StepInput, StepPlan, StepResult
from vllm_di.components.model_runner.standard import StandardModelRunner
from vllm_di.components.program.eager import EagerProgram
from vllm_di.components.sampler.standard import StandardSampler
from vllm_di.components.scheduler.continuous import ContinuousScheduler
from vllm_di.components.scheduler.sequence import Sequence as Running


class NoSalt(PagedKvCacheManager):
    def admit(
        self, seq_id: int, prefix: Prefix, take: Callable[[int], int]
    ) -> tuple[int, int] | None:
        return super().admit(seq_id, Prefix(prefix.token_ids), take)


class NoParent(PagedKvCacheManager):
    """Knows a block by its own tokens, whatever came before."""

    def _key_at(self, prefix: Prefix, index: int) -> bytes:
        size = self.block_size
        return paged._hash(b"", prefix.token_ids[index * size : (index + 1) * size])


class KeepsABlock(PagedKvCacheManager):
    """Never gives the last block of a sequence back."""

    def free(self, seq_id: int) -> None:
        if (table := self._tables.get(seq_id)) and table.groups[0]:
            self._users[table.groups[0][-1]] += 1
        super().free(seq_id)


class SharesABlock(PagedKvCacheManager):
    """Hands out the block that it handed out last, when it is somebody else's."""

    last: int | None = None

    def allocate(self, seq_id: int, num_tokens: int, num_computed: int) -> list[list[int]] | None:
        added = super().allocate(seq_id, num_tokens, num_computed)
        if added and (new := added[0]):
            blocks = self._tables[seq_id].groups[0]
            if self.last is not None and self.last not in blocks:
                self._users[new[-1]] -= 1
                self._free[new[-1]] = None
                self._users[self.last] += 1
                self._free.pop(self.last, None)
                blocks[-1] = new[-1] = self.last
            self.last = new[-1]
        return added


class MatchesTooMuch(PagedKvCacheManager):
    """Claims one token of every prompt that shares nothing to be a full block more."""

    def admit(
        self, seq_id: int, prefix: Prefix, take: Callable[[int], int]
    ) -> tuple[int, int] | None:
        extra = 0

        def taken(cached: int) -> int:
            nonlocal extra
            extra = int(0 < cached < len(prefix.token_ids) - 2)
            return take(cached + extra)

        found = super().admit(seq_id, prefix, taken)
        return None if found is None else (found[0] + extra, found[1])


class NeverForgets(PagedKvCacheManager):
    def reset_prefix_cache(self) -> None:
        pass


class AbortKeepsBlocks(ContinuousScheduler):
    """Forgets an aborted request, not its blocks."""

    def abort(self, request_id: str) -> bool:
        free, self._kv.free = self._kv.free, lambda seq_id: None  # type: ignore[method-assign]
        try:
            return super().abort(request_id)
        finally:
            self._kv.free = free  # type: ignore[method-assign]


class PreemptedLosesAToken(ContinuousScheduler):
    def _preempt(self, step: Any, sequence: Running) -> None:
        if len(sequence.token_ids) > sequence.prompt_len:
            sequence.token_ids[-1] = sequence.token_ids[0]
        super()._preempt(step, sequence)


class ChunkSkipsAToken(ContinuousScheduler):
    """Takes a chunk to have run one token more than it has."""

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        for share in plan.scheduled if plan else ():
            if share.num_tokens > 1 and not share.samples:
                self._running[share.seq_id].num_computed += 1
        return plan


class RowsOff(EagerProgram):
    """Gives the logits of the token before the one that was asked for."""

    def run(self, plan: BatchPlan) -> Tensor:
        plan.logits_rows = (plan.logits_rows - 1).clamp(min=0)
        return super().run(plan)


class BatchDependent(EagerProgram):
    """A little of each row reaches the others."""

    def run(self, plan: BatchPlan) -> Tensor:
        found = super().run(plan)
        return found + 0.05 * found.mean(0, keepdim=True) * (len(found) > 1)


class Noisy(EagerProgram):
    def run(self, plan: BatchPlan) -> Tensor:
        found = super().run(plan)
        return found + 0.05 * torch.rand_like(found)


class NarrowLogits(EagerProgram):
    """Logits that were rounded to bfloat16."""

    def run(self, plan: BatchPlan) -> Tensor:
        return super().run(plan).bfloat16().float()


class StaleGraph(EagerGraph):
    """Replays the first step of each size on its old inputs."""

    def wrap(self, forward: StepFunction) -> StepFunction:
        captured: dict[int, Tensor] = {}

        def replay(step: ModelStep) -> Tensor:
            found = forward(step)
            if len(step.token_ids) > 8:
                return found
            return captured.setdefault(len(step.token_ids), found.clone())

        return replay


class StalePositions(EagerGraph):
    """Positions are those of the capture."""

    def wrap(self, forward: StepFunction) -> StepFunction:
        captured: dict[int, Tensor] = {}

        def replay(step: ModelStep) -> Tensor:
            size = len(step.token_ids)
            if size <= 8:
                step.positions = captured.setdefault(size, step.positions.clone())
            return forward(step)

        return replay


class OwnSampler(StandardModelRunner):
    """Ignores the sampler that was chosen."""

    def warm_up(self) -> None:
        self._sampler = StandardSampler(self._model.ops)  # type: ignore[attr-defined]
        super().warm_up()


class Fragile(StandardModelRunner):
    """Lets a sampler's failure end the engine."""

    def execute(self, step: StepInput) -> StepResult:
        sampler, runner = self._sampler, self

        class Raises:
            def __getattr__(self, name: str) -> Any:
                return getattr(sampler, name)

            def sample(self, logits: Tensor, rows: Any) -> Any:
                try:
                    return sampler.sample(logits, rows)
                except Exception as error:
                    raise SystemError(str(error)) from error

        runner._sampler = Raises()  # type: ignore[assignment]
        try:
            found = super().execute(step)
        finally:
            runner._sampler = sampler
        if any("SystemError" in reason for reason in found.failed.values()):
            raise RuntimeError("the engine ends here")
        return found


class Unclosed(InlineExecutor):
    """Never closes its worker, and somebody still holds it."""

    held: ClassVar[list[InlineExecutor]] = []

    def close(self) -> None:
        self.held.append(self)


class MissingIsZero(SafetensorsLoader):
    """Fills what the file lacks with zeros."""

    def load(self, model: Model) -> None:
        take = model.load_weights

        def filled(weights: Any) -> None:
            found = dict(weights)
            for name, target in model.targets().items():  # type: ignore[attr-defined]
                if name not in found:
                    found[name] = torch.zeros(tuple(target.shape))
            take(iter(found.items()))

        model.load_weights = filled  # type: ignore[method-assign]
        super().load(model)


class NormForgotten(SafetensorsLoader):
    """Leaves the last norm as it was made."""

    def load(self, model: Model) -> None:
        take = model.load_weights

        def changed(weights: Any) -> None:
            take((n, torch.ones_like(t) if n == "model.norm.weight" else t) for n, t in weights)

        model.load_weights = changed  # type: ignore[method-assign]
        super().load(model)


class SurpriseAccepted(SafetensorsLoader):
    """Passes over tensors that the model does not know."""

    def load(self, model: Model) -> None:
        take = model.load_weights

        def known(weights: Any) -> None:
            targets = model.targets()  # type: ignore[attr-defined]
            take((n, t) for n, t in weights if n in targets)

        model.load_weights = known  # type: ignore[method-assign]
        super().load(model)
