"""Tries a port's code once at the start, on tiny tensors and before any weight is read: an op that
it claims and lacks, or a result of the wrong shape, is then an error with a place.

Only classes of other packages are tried; this project's own are held by its tests. Values are the
conformance suite's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_di.components.interfaces import AttentionSpec, BatchPlan, OpTable
from vllm_di.components.messages import KvSpec
from vllm_di.containers.assembly import Assembly
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import PortError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HIDDEN, TOKENS = 128, 3


def try_out(container: Any, assembly: Assembly, stage: int = 0) -> None:
    """Try the ops, KV layout, attention and graph policy of a filled worker container. Raises
    PortError."""
    model = container.model()
    names = ("ops", "kv_layout", "attention", "graph")
    try_parts(container, assembly, names, model.dtype, model.kv_specs(), stage)


def try_parts(
    container: Any,
    assembly: Assembly,
    names: Collection[str],
    dtype: torch.dtype,
    specs: Sequence[KvSpec],
    stage: int = 0,
) -> None:
    """Try what is of ``names``, on tensors of ``dtype`` and the first of ``specs``. Raises
    PortError."""
    if "ops" in names:
        table: OpTable = container.ops()
        check_claims(table, assembly, stage)
        library = assembly.path(WorkerContainer, "ops", stage) + ".library._target_"
        foreign = {op for op in OpTable.OPS if _is_foreign(table.library_of(op))}
        trials = op_trials(table, container.device().torch_device, dtype) if foreign else {}
        for op, trial in trials.items():
            if op in foreign:
                _try(f"ops.{op}", table.library_of(op), trial, assembly.place(library))
    if not specs:
        return
    others: dict[str, Callable[[], Trial]] = {
        "kv_layout": lambda: layout_trial(container, specs[0], dtype),
        "attention": lambda: attention_trial(container, specs[0], dtype),
        "graph": lambda: graph_trial(container),
    }
    for slot, make in others.items():
        if slot in names and _is_foreign(owner := container.providers[slot]()):
            path = assembly.path(WorkerContainer, slot, stage)
            _try(path, owner, make(), assembly.place(f"{path}._target_"))


def check_claims(table: OpTable, assembly: Assembly, stage: int = 0) -> None:
    """Whether each library has what it names, and the platform what its manifest names."""
    ops = assembly.path(WorkerContainer, "ops", stage)
    place = assembly.place(f"{ops}.library._target_")
    for owner in {id(o): o for op in OpTable.OPS if (o := table.library_of(op))}.values():
        if not _is_foreign(owner):
            continue
        name = type(owner).__qualname__
        for op in sorted(owner.implements):
            if op not in OpTable.OPS:
                raise PortError(
                    f"{place}: ops: {name}.implements names {op!r}, which is no op"
                    f"{nearest(op, OpTable.OPS)}"
                )
            if op not in owner.methods:
                raise PortError(
                    f"{place}: ops: {name}.implements names {op!r}, but {name} has no method "
                    f"{op} of its own"
                )
    manifest = assembly.platform_of(stage)
    by_user = assembly.choices[ops].origin.by_user
    if manifest.interface is None or by_user:
        return
    for op in manifest.capabilities.ops:
        origin = assembly.origins.get(f"{ops}.{op}")
        chosen = origin is not None and origin.by_user
        library = table.library_of(op)
        if library is not None and not library.methods and not chosen:
            key = assembly.path(WorkerContainer, "platform", stage) + ".capabilities.ops"
            raise PortError(
                f"{assembly.place(key)}: {key} claims {op}, but the library of {manifest.name} "
                "does not implement it"
            )


def _is_foreign(component: object) -> bool:
    return type(component).__module__.split(".")[0] not in ("vllm_di", "builtins")


Results = Mapping[str, "tuple[Tensor, tuple[int, ...], torch.dtype]"]
"""Name of a result to the result, its promised shape and its promised dtype."""
Trial = Callable[[], Results]


def _try(path: str, owner: Any, trial: Trial, place: str) -> None:
    name = f"{type(owner).__module__}.{type(owner).__qualname__}"
    try:
        results = trial()
    except NotImplementedError:
        return  # attention of a compiled program has an export, and may have nothing else
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise PortError(
            f"{place}: {path}: {name} fails on a small input: {type(error).__name__}: {line}"
        ) from error
    for what, (found, shape, dtype) in results.items():
        got = (tuple(getattr(found, "shape", ())), getattr(found, "dtype", type(found)))
        if got != (shape, dtype):
            raise PortError(
                f"{place}: {path}: {name} gives {what} of shape {list(got[0])} and {got[1]}; "
                f"expected shape {list(shape)} and {dtype}"
            )


def op_trials(table: OpTable, device: torch.device, dtype: torch.dtype) -> dict[str, Trial]:
    """Op to a call of it on ``TOKENS`` rows, for the ops whose inputs need no cache."""
    import torch

    def floats(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, 0.5, dtype=kind, device=device)

    def one(result: Tensor, *shape: int, kind: torch.dtype = dtype) -> Results:
        return {"a result": (result, shape, kind)}

    def add_rms_norm() -> Results:
        normed, total = table.add_rms_norm(
            floats(TOKENS, HIDDEN), floats(TOKENS, HIDDEN), floats(HIDDEN), 1e-5
        )
        shape = (TOKENS, HIDDEN)
        return {"a norm": (normed, shape, dtype), "a residual": (total, shape, dtype)}

    def rotary_embedding() -> Results:
        q, k = floats(TOKENS, 4, HIDDEN), floats(TOKENS, 2, HIDDEN)
        cos_sin = floats(8, HIDDEN, kind=torch.float32)
        turned = table.rotary_embedding(ids, q, k, cos_sin, False)
        shapes = {"q": (TOKENS, 4, HIDDEN), "k": (TOKENS, 2, HIDDEN)}
        return {n: (t, shapes[n], dtype) for n, t in zip(shapes, turned, strict=True)}

    def fused_qk_norm_rope() -> Results:
        qkv, weight = floats(TOKENS, 8 * HIDDEN), floats(HIDDEN)
        cos_sin = floats(8, HIDDEN, kind=torch.float32)
        turned = table.fused_qk_norm_rope(ids, qkv, 4, 2, weight, weight, 1e-5, cos_sin, False)
        shapes = {"q": (TOKENS, 4, HIDDEN), "k": (TOKENS, 2, HIDDEN)}
        return {n: (t, shapes[n], dtype) for n, t in zip(shapes, turned, strict=True)}

    def top_k_top_p_sample() -> Results:
        logits = floats(TOKENS, HIDDEN, kind=torch.float32)
        ones = torch.ones(TOKENS, dtype=torch.float32, device=device)
        chosen = table.top_k_top_p_sample(logits, ids + 5, ones, ones * 0, ones * 0.5)
        return one(chosen, TOKENS, kind=torch.int64)

    ids = torch.arange(TOKENS, dtype=torch.int64, device=device)
    x, wide, weight = floats(TOKENS, HIDDEN), floats(TOKENS, 2 * HIDDEN), floats(64, HIDDEN)
    logits = floats(TOKENS, HIDDEN, kind=torch.float32)
    return {
        "rms_norm": lambda: one(table.rms_norm(x, floats(HIDDEN), 1e-5), TOKENS, HIDDEN),
        "add_rms_norm": add_rms_norm,
        "rotary_embedding": rotary_embedding,
        "fused_qk_norm_rope": fused_qk_norm_rope,
        "silu_and_mul": lambda: one(table.silu_and_mul(wide), TOKENS, HIDDEN),
        "gelu_tanh_and_mul": lambda: one(table.gelu_tanh_and_mul(wide), TOKENS, HIDDEN),
        "linear": lambda: one(table.linear(x, table.pack_linear(weight)), TOKENS, 64),
        "gated_linear": lambda: one(
            table.gated_linear(x, table.pack_gated_linear(weight), None, "silu"), TOKENS, 32
        ),
        "embedding": lambda: one(table.embedding(ids, weight), TOKENS, HIDDEN),
        "greedy_sample": lambda: one(table.greedy_sample(logits), TOKENS, kind=torch.int64),
        "top_k_top_p_sample": top_k_top_p_sample,
    }


def tiny_plan(on: torch.device) -> BatchPlan:
    """A prefill of ``TOKENS`` tokens in block 0."""
    import torch

    positions = torch.arange(TOKENS, dtype=torch.int64, device=on)
    return BatchPlan(
        token_ids=positions,
        positions=positions,
        query_start=torch.tensor([0, TOKENS], dtype=torch.int32, device=on),
        seq_lens=torch.tensor([TOKENS], dtype=torch.int32, device=on),
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=on),
        slot_mapping=positions,
        logits_rows=positions[-1:],
        query_lens_host=[TOKENS],
        seq_lens_host=[TOKENS],
    )


def attention_trial(container: Any, spec: KvSpec, dtype: torch.dtype) -> Trial:
    """A prefill of ``TOKENS`` tokens through the first layer's cache, in a block of its own."""
    import torch

    on, layout = container.device().torch_device, container.kv_layout()
    shape = (TOKENS, spec.num_kv_heads, spec.head_size)

    def trial() -> Results:
        (cache,) = layout.allocate([spec], 1, dtype)
        x = torch.full(shape, 0.5, dtype=dtype, device=on)
        fixed = AttentionSpec(spec.num_kv_heads, spec.num_kv_heads, spec.head_size, 1.0)
        backend = container.attention()
        metadata = backend.build(tiny_plan(on))
        found = backend.forward(x, x.clone(), x.clone(), cache, metadata, fixed)
        return {"a result": (found, shape, dtype)}

    return trial


def layout_trial(container: Any, spec: KvSpec, dtype: torch.dtype) -> Trial:
    """One block of the first layer's cache, and a token that is written to it and read again."""
    import torch

    on, layout = container.device().torch_device, container.kv_layout()
    shape = (1, spec.num_kv_heads, spec.head_size)

    def trial() -> Results:
        (cache,) = layout.allocate([spec], 1, dtype)
        results = {
            f"the tensor {described.name!r}": (tensor, described.whole_shape(1), described.dtype)
            for described, tensor in zip(layout.describe(spec, dtype), cache.tensors, strict=True)
        }
        x = torch.full(shape, 0.5, dtype=dtype, device=on)
        layout.write(cache, x, x, torch.zeros(1, dtype=torch.int64, device=on))
        k, v = layout.gather(cache, torch.zeros(1, dtype=torch.int32, device=on), 1)
        return results | {"keys": (k, shape, k.dtype), "values": (v, shape, v.dtype)}

    return trial


def graph_trial(container: Any) -> Trial:
    """The plan of a step, as the policy places it before anything is captured."""
    on = container.device().torch_device

    def trial() -> Results:
        placed = container.graph().place(tiny_plan(on))
        plan, out = placed if isinstance(placed, tuple) and len(placed) == 2 else (None, None)
        if not isinstance(plan, BatchPlan) or not isinstance(out, Sequence):
            kinds = ", ".join(type(x).__name__ for x in placed) if plan is not None else placed
            raise TypeError(
                f"place gives ({kinds}), and not a BatchPlan with a sequence: the metadata of each "
                "KvGroup, or ()"
            )
        return {}

    return trial
