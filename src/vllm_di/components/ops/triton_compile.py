"""The launches of ``TritonOps`` at the shapes of Llama-3-8B, compiled for GPUs that are not
present."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vllm_di.components.compile_check import CompileCheck, Compiled
from vllm_di.components.ops.triton import TritonOps
from vllm_di.errors import ConfigError, PortError

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, MLP, VOCAB = 4096, 32, 8, 128, 14336, 128256
"""Of Llama-3-8B (conf/model/llama3.yaml)."""
PAGE = 32
PROGRAMS = 528
"""Programs that keep an H100 busy: four for each of its 132 multiprocessors."""
ATTENTION = {"decode": (1, 1), "chunk": (16, 1), "prefill": (4096, 2)}
"""(tokens, sequences): one for each of attention's tiles."""
KERNEL = "vllm_di.components.ops.triton.TritonOps"


class TritonCompile(CompileCheck):
    """Each op once, in bfloat16, attention once for each of its tiles. What is compiled stays in
    Triton's own cache."""

    def __init__(self, worker: Mapping[str, Any]) -> None:
        library = dict(worker["ops"].get("library", {}))
        if library.pop("_target_", None) != KERNEL:
            raise ConfigError(
                "platform.compile compiles the kernels of ops=triton, and ops is something else"
            )
        self._settings = {**library, "programs": library["programs"] or PROGRAMS}
        TritonOps(**self._settings)  # an error where triton is absent or a key is wrong
        # both import triton, which TritonOps found
        from vllm_di.kernels.triton.compile import Compiler
        from vllm_di.kernels.triton.targets import TARGETS

        self._compiler, self._limits = Compiler, TARGETS

    @classmethod
    def targets(cls) -> Sequence[str]:
        try:
            from vllm_di.kernels.triton.targets import TARGETS
        except ModuleNotFoundError as error:
            raise PortError(
                "platform.compile: the package triton is not installed; pip install 'vllm-di[cuda]'"
            ) from error
        return list(TARGETS)

    @classmethod
    def parts(cls) -> Sequence[str]:
        return list(LAUNCHES)

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        from vllm_di.kernels.triton import code_objects, runtime

        return {"triton": runtime.VERSION} | code_objects.compiler_versions()

    def compile(self, part: str, target: str) -> Sequence[Compiled]:
        limits, compiler = self._limits[target], self._compiler(target)
        ops = TritonOps(**self._settings)
        ops.launch, ops.architecture = compiler, target
        LAUNCHES[part](ops)
        found = []
        for made in compiler.made:
            figures = asdict(made.usage) | {
                "program_registers": made.usage.registers * made.num_threads,
                "num_warps": made.num_warps,
                "num_stages": made.num_stages,
            }
            bars = {
                "spilled": limits.spilled,
                "shared_bytes": limits.shared_bytes,
                "program_registers": limits.registers,
            }
            if limits.code_bytes is not None:
                bars["code_bytes"] = limits.code_bytes
            found.append(Compiled(made.kernel, figures, bars, _advice(made.kernel, target)))
        return found


def _advice(kernel: str, target: str) -> str:
    if kernel != "attention_kernel":
        return "choose another library for this op, for example ops.<op>=torch"
    return (
        f"lower ops.library.num_stages, or give {target} a smaller tile (kernels/triton/tiles.py)"
    )


def _bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def _heads(tokens: int) -> list[Tensor]:
    """q, k and v as the model has them: views of the output of one GEMM."""
    sizes = [HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE]
    return [p.unflatten(1, (-1, HEAD_SIZE)) for p in _bf16(tokens, sum(sizes)).split(sizes, -1)]


def _cache() -> Tensor:
    return _bf16(4, KV_HEADS, PAGE, HEAD_SIZE)


def _ids(count: int = 2) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def _rotary_table() -> Tensor:
    return torch.empty(9, HEAD_SIZE, dtype=torch.float32)


def _rotary_embedding(ops: TritonOps) -> object:
    q, k, _ = _heads(2)
    return ops.rotary_embedding(_ids(), q, k, _rotary_table(), False)


def _write_kv(ops: TritonOps) -> None:
    _, k, v = _heads(2)
    ops.write_kv(k, v, _cache(), _cache(), _ids())


def _rotary_write_kv(ops: TritonOps) -> object:
    cache, (q, k, v) = _cache(), _heads(2)
    return ops.rotary_write_kv(_ids(), q, k, v, _rotary_table(), False, cache, cache, _ids())


def _fused_experts(ops: TritonOps, tokens: int) -> object:
    """Eight experts, two for each token, as in Mixtral, with another width."""
    experts, inter = 8, 256
    ids = torch.zeros(tokens, 2, dtype=torch.int64)
    shares = torch.zeros(tokens, 2, dtype=torch.float32)
    up, down = _bf16(experts, 2 * inter, HIDDEN), _bf16(experts, HIDDEN, inter)
    return ops.fused_experts(_bf16(tokens, HIDDEN), up, down, shares, ids, "silu")


def _attention(ops: TritonOps, tokens: int, seqs: int) -> object:
    cache, (q, *_) = _cache(), _heads(tokens)
    starts, lengths = torch.zeros(seqs + 1, dtype=torch.int32), torch.zeros(seqs, dtype=torch.int32)
    table = torch.zeros(seqs, 256, dtype=torch.int32)  # contexts of up to 8,192 tokens
    return ops.paged_attention(q, cache, cache, starts, lengths, table, 0.1, None, None)


def _logits() -> Tensor:
    return torch.empty(2, VOCAB, dtype=torch.float32)


def _sample(ops: TritonOps) -> object:
    numbers = torch.empty(2, dtype=torch.float32)
    return ops.top_k_top_p_sample(_logits(), _ids(), numbers, numbers, numbers)


LAUNCHES: Mapping[str, Callable[[TritonOps], object]] = {
    "rms_norm": lambda ops: ops.rms_norm(_bf16(2, HIDDEN), _bf16(HIDDEN), 1e-5),
    "rms_norm of heads": lambda ops: ops.rms_norm(_heads(64)[0], _bf16(HEAD_SIZE), 1e-5),
    "add_rms_norm": lambda ops: ops.add_rms_norm(
        _bf16(2, HIDDEN), _bf16(2, HIDDEN), _bf16(HIDDEN), 1e-5
    ),
    "rotary_embedding": _rotary_embedding,
    "silu_and_mul": lambda ops: ops.silu_and_mul(_bf16(2, 2 * MLP)),
    "gelu_tanh_and_mul": lambda ops: ops.gelu_tanh_and_mul(_bf16(2, 2 * MLP)),
    "fused_experts decode": lambda ops: _fused_experts(ops, 4),
    "fused_experts prefill": lambda ops: _fused_experts(ops, 1024),
    "write_kv": _write_kv,
    "rotary_write_kv": _rotary_write_kv,
    "paged_attention decode": lambda ops: _attention(ops, *ATTENTION["decode"]),
    "paged_attention chunk": lambda ops: _attention(ops, *ATTENTION["chunk"]),
    "paged_attention prefill": lambda ops: _attention(ops, *ATTENTION["prefill"]),
    "greedy_sample": lambda ops: ops.greedy_sample(_logits()),
    "top_k_top_p_sample": _sample,
}
"""Name of a part of the report to a call of an op, on host tensors that nothing reads."""
