"""The op table: for each op, the library that runs it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vllm_di.components.interfaces import OpLibrary, OpTable
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError

Choice = OpLibrary | Literal["auto"]


class SelectedOps(OpTable):
    """Takes each op from the library that the config names for it.

    ``auto`` is the main library where it implements the op, else the torch reference. The chosen
    bound methods become attributes of the instance, so that a call goes straight to the library.
    """

    fusions: tuple[str, ...]
    """Fused ops in force."""

    def __init__(
        self,
        library: OpLibrary,
        *,
        rms_norm: OpLibrary | Literal["auto"] = "auto",
        add_rms_norm: OpLibrary | Literal["auto"] = "auto",
        rotary_embedding: OpLibrary | Literal["auto"] = "auto",
        silu_and_mul: OpLibrary | Literal["auto"] = "auto",
        gelu_tanh_and_mul: OpLibrary | Literal["auto"] = "auto",
        linear: OpLibrary | Literal["auto"] = "auto",
        embedding: OpLibrary | Literal["auto"] = "auto",
        fused_experts: OpLibrary | Literal["auto"] = "auto",
        write_kv: OpLibrary | Literal["auto"] = "auto",
        paged_attention: OpLibrary | Literal["auto"] = "auto",
        greedy_sample: OpLibrary | Literal["auto"] = "auto",
        top_k_top_p_sample: OpLibrary | Literal["auto"] = "auto",
    ) -> None:
        chosen: dict[str, Choice] = {
            "rms_norm": rms_norm,
            "add_rms_norm": add_rms_norm,
            "rotary_embedding": rotary_embedding,
            "silu_and_mul": silu_and_mul,
            "gelu_tanh_and_mul": gelu_tanh_and_mul,
            "linear": linear,
            "embedding": embedding,
            "fused_experts": fused_experts,
            "write_kv": write_kv,
            "paged_attention": paged_attention,
            "greedy_sample": greedy_sample,
            "top_k_top_p_sample": top_k_top_p_sample,
        }
        reference = TorchOps()
        self._owners: dict[str, OpLibrary | None] = {}
        for op, choice in chosen.items():
            owner = library if choice == "auto" else choice
            if op not in owner.implements:
                if choice != "auto":
                    raise ConfigError(
                        f"{op}: {type(owner).__name__} does not implement it; it has "
                        f"{', '.join(sorted(owner.implements)) or 'no op at all'}"
                    )
                owner = reference
            self._owners[op] = owner
        for fused, members in self.FUSED.items():
            if chosen[fused] == "auto" and any(
                self._kind(member) is not self._kind(fused) for member in members
            ):
                self._owners[fused] = None
        self.fusions = tuple(op for op in self.FUSED if self._owners[op] is not None)
        for op, maker in self._owners.items():
            if maker is not None:
                setattr(self, op, getattr(maker, op))
        self.pack_linear = self._library("linear").pack_linear  # type: ignore[method-assign]
        self._reasons = library.describe()

    def _kind(self, op: str) -> type | None:
        owner = self._owners[op]
        return None if owner is None else type(owner)

    def _library(self, op: str) -> OpLibrary:
        owner = self._owners[op]
        assert owner is not None
        return owner

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The unfused path: what runs when a member of the fused op was chosen from elsewhere."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def describe(self) -> dict[str, str]:
        """Op to where it runs; where the main library has a reason for not running it, the
        reason."""
        rows = {}
        for op, owner in self._owners.items():
            if owner is None:
                rows[op] = f"unfused: {', '.join(self.FUSED[op])} was chosen from another library"
            elif isinstance(owner, TorchOps):
                reason = self._reasons.get(op, "")
                rows[op] = "torch" + (f" ({reason})" if reason.startswith("no ") else "")
            else:
                rows[op] = owner.describe().get(op, type(owner).__name__)
        return rows

    # Replaced in the constructor by the chosen library's methods; here for the interface.

    rms_norm = TorchOps.rms_norm
    rotary_embedding = TorchOps.rotary_embedding
    silu_and_mul = TorchOps.silu_and_mul
    gelu_tanh_and_mul = TorchOps.gelu_tanh_and_mul
    linear = TorchOps.linear
    embedding = TorchOps.embedding
    fused_experts = TorchOps.fused_experts
    write_kv = TorchOps.write_kv
    paged_attention = TorchOps.paged_attention
    greedy_sample = TorchOps.greedy_sample
    top_k_top_p_sample = TorchOps.top_k_top_p_sample
