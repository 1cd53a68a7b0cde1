"""The other slots of a worker: device, communicator, limits, sampler, runner, worker."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_di.components.interfaces import (
    AttentionBackend,
    BatchPlan,
    Communicator,
    Device,
    DeviceMemory,
    KvLayout,
    Loader,
    Model,
    ModelProgram,
    ModelRunner,
    OpTable,
    Placement,
    PlanShape,
    Pooler,
    Sampler,
    SchedulerLimits,
    SequenceState,
    ShapePolicy,
    Worker,
)
from vllm_di.components.messages import (
    CacheSize,
    KvGroup,
    LimitsReport,
    Pooling,
    SampledTokens,
    ScheduledSequence,
    StepInput,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WorkerReport,
)
from vllm_di.errors import ConfigError


class FrozenDevice(Device):
    """The host."""

    torch_device = torch.device("cpu")
    default_dtype = torch.float32
    supported_dtypes = (torch.float32,)
    on_host = True

    def __init__(self) -> None: ...

    def memory(self) -> DeviceMemory | None:
        return None

    def synchronize(self) -> None: ...


class FrozenCommunicator(Communicator):
    """A world of one."""

    def __init__(self, placement: Placement) -> None:
        if placement.world_size > 1 or placement.num_stages > 1:
            raise ConfigError("communicator=frozen_2_0 has one rank and one stage; use cpu's")
        self.rank, self.world_size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x


class FrozenLimits(SchedulerLimits):
    """Steps of several tokens for a decoding sequence are beyond the runner."""

    def __init__(self) -> None: ...

    def report(self) -> LimitsReport:
        return LimitsReport(drafts=False)


class FrozenSampler(Sampler):
    """Row by row: penalties and masks, then the best token, or one drawn by seed and position."""

    request_faults = frozenset({"no token can be chosen"})

    def __init__(self, ops: OpTable) -> None:
        self._ops = ops

    def sample(
        self, logits: Tensor, rows: Sequence[SequenceState]
    ) -> tuple[list[SampledTokens], dict[int, str]]:
        tokens, failed = [], {}
        with torch.inference_mode():
            for values, row in zip(logits, rows, strict=True):
                if not values.isfinite().all():
                    failed[row.seq_id] = "the model gave logits that are not finite"
                    continue
                adjusted = _adjusted(values.clone(), row)
                if adjusted.max() == -torch.inf:
                    failed[row.seq_id] = "no token can be chosen"
                    continue
                token = self._choose(adjusted, row)
                count = row.params.logprobs
                logprobs = None if count is None else [_report(values, token, count)]
                tokens.append(SampledTokens(row.seq_id, [token], logprobs))
        return tokens, failed

    def prompt_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], count: int
    ) -> list[TokenLogprobs]:
        with torch.inference_mode():
            return [_report(row, i, count) for row, i in zip(logits, token_ids, strict=True)]

    def _choose(self, logits: Tensor, row: SequenceState) -> int:
        params = row.params
        if params.greedy:
            return int(self._ops.greedy_sample(logits[None]))
        if row.sampler_state is None:
            row.sampler_state = params.seed if params.seed is not None else secrets.randbits(64)

        def one(value: float) -> Tensor:
            return torch.tensor([value], dtype=torch.float32)

        scaled = (logits - logits.max()) / params.temperature
        top_k = torch.tensor([params.top_k if params.top_k > 0 else len(logits)])
        draw = uniform(row.sampler_state, row.num_generated)
        return int(
            self._ops.top_k_top_p_sample(
                scaled[None], top_k, one(params.top_p), one(params.min_p), one(draw)
            )
        )


def _adjusted(logits: Tensor, row: SequenceState) -> Tensor:
    """logits [vocab], changed as the request asks."""
    params, output = row.params, row.token_ids[row.prompt_len :]
    if params.allowed_token_ids is not None:
        allowed = logits[params.allowed_token_ids]
        logits.fill_(-torch.inf)
        logits[params.allowed_token_ids] = allowed
    for word in row.bad_words_token_ids:
        before = word[:-1]
        if not before or output[-len(before) :] == before:
            logits[word[-1]] = -torch.inf
    if row.num_generated < params.min_tokens:
        logits[[*row.eos_token_ids, *params.stop_token_ids]] = -torch.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if params.repetition_penalty != 1.0:
        for token in set(row.token_ids):
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return logits


def _report(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.sort(descending=True, stable=True)
    return TokenLogprobs(
        [token, *ids[:count].tolist()],
        [float(logprobs[token]), *values[:count].tolist()],
        int((logprobs > logprobs[token]).sum()) + 1,
    )


def uniform(seed: int, position: int) -> float:
    """In [0, 1), 24 bits of SplitMix64."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return float((z ^ (z >> 31)) >> 40) * 2.0**-24


class FrozenPooler(Pooler):
    """Pools nothing, so that nothing but ``pools`` is called."""

    def __init__(self) -> None: ...

    def pools(self) -> bool:
        return False

    def report(self, size: int) -> Pooling:
        raise NotImplementedError("the model generates")

    def wanted(self, start: int, count: int, prompt_len: int) -> range:
        return range(0)

    def take(self, rows: Tensor, state: SequenceState) -> None:
        raise NotImplementedError("the model generates")

    def finish(self, state: SequenceState) -> Tensor:
        raise NotImplementedError("the model generates")


class FrozenRunner(ModelRunner):
    """Builds the tensors of each step anew."""

    def __init__(
        self, program: ModelProgram, kv_layout: KvLayout, shapes: ShapePolicy, sampler: Sampler
    ) -> None:
        self._program, self._shapes, self._sampler = program, shapes, sampler
        self._block_size = kv_layout.block_size
        self._states: dict[int, SequenceState] = {}

    def allocate(self, groups: Sequence[KvGroup], num_blocks: int) -> None:
        if len(groups) != 1:
            raise ConfigError(
                f"model_runner=frozen_2_0 has one block table for each sequence, but the model "
                f"has {len(groups)} KV groups; choose model_runner=standard"
            )
        self._program.allocate(groups, num_blocks)

    def warm_up(self) -> None:
        one = PlanShape(tokens=1, rows=1, seqs=1, columns=1, queries=1)
        for plan in self._shapes.warm_up_plans(one, lambda shape: _blank()):
            self._program.run(plan)

    def execute(self, step: StepInput) -> StepResult:
        plan = step.plan
        self._update(plan)
        sampled = [share.seq_id for share in plan.scheduled if share.samples]
        if not plan.scheduled:
            return StepResult(plan.step, [])
        logits = self._program.run(self._shapes.pad(self._build(plan.scheduled)))
        rows = [self._states[seq_id] for seq_id in sampled]
        self._sampler.begin(rows, [[] for _ in rows])
        tokens, failed = self._sampler.sample(logits[: len(rows)], rows)
        refused = [i for i, reason in failed.items() if reason in self._sampler.request_faults]
        return StepResult(plan.step, tokens, failed=failed, refused=refused)

    def _update(self, plan: StepPlan) -> None:
        for seq_id in plan.finished:
            self._states.pop(seq_id, None)
        for new in plan.new:
            self._states[new.seq_id] = SequenceState(
                seq_id=new.seq_id,
                params=new.params,
                token_ids=list(new.token_ids),
                prompt_len=new.prompt_len,
                block_ids=[[]],
                eos_token_ids=new.eos_token_ids,
                bad_words_token_ids=new.bad_words_token_ids,
            )
        for share in plan.scheduled:
            state = self._states[share.seq_id]
            state.token_ids += share.new_tokens
            state.block_ids[0] += share.new_blocks[0] if share.new_blocks else []

    def _build(self, scheduled: Sequence[ScheduledSequence]) -> BatchPlan:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, rows = [0], []
        blocks = [self._states[share.seq_id].block_ids[0] for share in scheduled]
        for share, table in zip(scheduled, blocks, strict=True):
            if share.draft_tokens:
                raise ValueError("limits=frozen_2_0 says that no step has drafts")
            span = range(share.num_computed, share.num_computed + share.num_tokens)
            tokens += self._states[share.seq_id].token_ids[span.start : span.stop]
            positions += span
            size = self._block_size
            slots += [table[p // size] * size + p % size for p in span]
            starts.append(len(tokens))
            if share.samples:
                rows.append(len(tokens) - 1)
        widest = max(map(len, blocks))
        lengths = [share.num_computed + share.num_tokens for share in scheduled]
        return BatchPlan(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=torch.tensor(
                [table + [0] * (widest - len(table)) for table in blocks], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots),
            logits_rows=torch.tensor(rows, dtype=torch.int64),
            query_lens_host=[share.num_tokens for share in scheduled],
            seq_lens_host=lengths,
        )


def _blank() -> BatchPlan:
    """One token that touches no block."""
    return BatchPlan(
        token_ids=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(1, dtype=torch.int64),
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.ones(1, dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.tensor([-1]),
        logits_rows=torch.zeros(1, dtype=torch.int64),
        query_lens_host=[1],
        seq_lens_host=[1],
    )


class FrozenWorker(Worker):
    """One rank with as many blocks as the config says."""

    def __init__(
        self,
        device: Device,
        loader: Loader,
        model: Model,
        kv_layout: KvLayout,
        attention: AttentionBackend,
        limits: SchedulerLimits,
        program: ModelProgram,
        model_runner: ModelRunner,
        *,
        num_blocks: int,
    ) -> None:
        if kv_layout.name not in attention.layouts and "*" not in attention.layouts:
            raise ConfigError(
                f"attention reads the KV layouts {', '.join(attention.layouts)}, but kv_layout is "
                f"{kv_layout.name}"
            )
        self._device, self._loader, self._model, self._layout = device, loader, model, kv_layout
        self._limits, self._program, self._runner = limits, program, model_runner
        self._num_blocks, self._groups = num_blocks, list[KvGroup]()

    def load(self) -> WorkerReport:
        self._loader.load(self._model)
        return WorkerReport(
            block_size=self._layout.block_size,
            kv_specs=self._model.kv_specs(),
            limits=self._limits.report(),
            max_model_len=self._model.max_model_len,
            vocab_size=self._model.vocab_size,
            eos_token_ids=self._model.eos_token_ids,
            device=str(self._device.torch_device),
            dtype=str(self._model.dtype).removeprefix("torch."),
            weight_bytes=self._model.weight_bytes(),
        )

    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        self._groups = groups
        self._program.prepare(groups)
        self._runner.prepare(groups)
        size = self._layout.bytes_per_block(self._model.kv_specs(), self._model.dtype)
        return CacheSize(self._num_blocks, size)

    def allocate(self, num_blocks: int) -> None:
        self._runner.allocate(self._groups, num_blocks)
        self._runner.warm_up()

    def execute(self, step: StepInput) -> StepResult:
        return self._runner.execute(step)
