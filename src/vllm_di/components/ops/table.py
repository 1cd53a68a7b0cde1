"""The op table: for each op, the library that runs it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vllm_di.components.interfaces import OpLibrary, OpTable, Recorder
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError, PortError

Choice = OpLibrary | Literal["auto"]

PACKS = {
    "linear": "pack_linear",
    "quantized_linear": "pack_quantized",
    "gated_linear": "pack_gated_linear",
    "gated_quantized_linear": "pack_gated_quantized",
    "embedding": "packed_embedding",
}
"""Op to the method that packs its weights, or knows how to read packed ones."""


class SelectedOps(OpTable):
    """Takes each op from the library that the config names for it.

    ``auto`` is the main library where it implements the op, else the torch reference. The chosen
    bound methods become attributes of the instance, so that a call goes straight to the library.
    """

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
        quantized_linear: OpLibrary | Literal["auto"] = "auto",
        gated_linear: OpLibrary | Literal["auto"] = "auto",
        gated_quantized_linear: OpLibrary | Literal["auto"] = "auto",
        embedding: OpLibrary | Literal["auto"] = "auto",
        fused_experts: OpLibrary | Literal["auto"] = "auto",
        write_kv: OpLibrary | Literal["auto"] = "auto",
        paged_attention: OpLibrary | Literal["auto"] = "auto",
        greedy_sample: OpLibrary | Literal["auto"] = "auto",
        top_k_top_p_sample: OpLibrary | Literal["auto"] = "auto",
        rotary_write_kv: OpLibrary | Literal["auto"] = "auto",
    ) -> None:
        chosen: dict[str, Choice] = {
            "rms_norm": rms_norm,
            "add_rms_norm": add_rms_norm,
            "rotary_embedding": rotary_embedding,
            "silu_and_mul": silu_and_mul,
            "gelu_tanh_and_mul": gelu_tanh_and_mul,
            "linear": linear,
            "quantized_linear": quantized_linear,
            "gated_linear": gated_linear,
            "gated_quantized_linear": gated_quantized_linear,
            "embedding": embedding,
            "fused_experts": fused_experts,
            "write_kv": write_kv,
            "paged_attention": paged_attention,
            "greedy_sample": greedy_sample,
            "top_k_top_p_sample": top_k_top_p_sample,
            "rotary_write_kv": rotary_write_kv,
        }
        reference = TorchOps()
        self._library = library
        self._owners: dict[str, OpLibrary | None] = {}
        """Op to the library that runs it; None for a fused op that is taken apart."""
        for op, choice in chosen.items():
            owner = library if choice == "auto" else choice
            if op not in owner.implements:
                if choice != "auto":
                    reason = owner.describe().get(op)
                    raise ConfigError(
                        f"ops.{op}: {type(owner).__name__} does not implement it"
                        f"{f' ({reason})' if reason else ''}; it has "
                        f"{', '.join(sorted(owner.implements)) or 'no op at all'}"
                    )
                owner = reference
            elif getattr(type(owner), op) is vars(OpLibrary).get(op):
                raise PortError(
                    f"ops.{op}: {type(owner).__name__} names it in `implements` and has no method "
                    f"{op}; write it, or name only what is there"
                )
            self._owners[op] = owner
        for fused, members in self.FUSED.items():
            whole = self._owners[fused]
            if chosen[fused] == "auto" and not all(
                _same(self._owners[member], whole) for member in members
            ):
                self._owners[fused] = None
        self.fusions = tuple(op for op in self.FUSED if self._owners[op] is not None)
        self.opaque = {
            op: type(owner).__name__
            for op, owner in self._owners.items()
            if owner is not None and not owner.traceable
        }
        for op, found in self._owners.items():
            if found is not None:
                setattr(self, op, getattr(found, op))
        norms = self._owners["rms_norm"]
        assert norms is not None
        self._norm = norms.rms_norm
        for op, pack in PACKS.items():
            if (found := self._owners[op]) is not None:
                setattr(self, pack, getattr(found, pack))

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The unfused path: what runs when a member of the fused op runs elsewhere."""
        total = x + residual
        return self._norm(total, weight, eps), total

    def describe(self) -> dict[str, str]:
        """Op to where it runs; where the main library has a reason for not running it, the
        reason."""
        reasons = {} if type(self._library) is TorchOps else self._library.describe()
        rows = {}
        for op, owner in self._owners.items():
            if owner is None:
                apart = self._apart(op)
                runs = "runs" if len(apart) == 1 else "run"
                rows[op] = f"unfused: {', '.join(apart)} {runs} on another library"
            elif type(owner) is not TorchOps:
                rows[op] = owner.describe().get(op, type(owner).__name__)
            elif op not in self._library.implements:
                rows[op] = f"torch ({reasons.get(op, 'the reference')})"
            else:
                rows[op] = "torch"
        return rows

    def library_of(self, op: str) -> OpLibrary | None:
        return self._owners[op]

    def _apart(self, fused: str) -> list[str]:
        """The members that do not run where the fused op would."""
        whole = self._library if fused in self._library.implements else TorchOps()
        return [m for m in self.FUSED[fused] if not _same(self._owners[m], whole)]

    def recorder(self) -> Recorder | None:
        """The main library's, when no other library has a hand in it: torch's ops can be seen in a
        recording, those of a third library cannot."""
        known = (self._library, None)
        others = [o for o in self._owners.values() if o not in known and type(o) is not TorchOps]
        return None if others else self._library.recorder()

    def close(self) -> None:
        """Close every library in use, each once."""
        owners = {id(owner): owner for owner in (self._library, *self._owners.values()) if owner}
        for owner in owners.values():
            owner.close()

    # Replaced in the constructor by the chosen library's methods; here for the interface.

    rms_norm = TorchOps.rms_norm
    rotary_embedding = TorchOps.rotary_embedding
    silu_and_mul = TorchOps.silu_and_mul
    gelu_tanh_and_mul = TorchOps.gelu_tanh_and_mul
    linear = TorchOps.linear
    quantized_linear = TorchOps.quantized_linear
    gated_linear = TorchOps.gated_linear
    gated_quantized_linear = TorchOps.gated_quantized_linear
    embedding = TorchOps.embedding
    packed_embedding = TorchOps.packed_embedding
    fused_experts = TorchOps.fused_experts
    write_kv = TorchOps.write_kv
    paged_attention = TorchOps.paged_attention
    greedy_sample = TorchOps.greedy_sample
    top_k_top_p_sample = TorchOps.top_k_top_p_sample


def _same(one: OpLibrary | None, other: OpLibrary | None) -> bool:
    """Two objects of one class that say the same of themselves are one library, built twice."""
    if one is None or other is None or type(one) is not type(other):
        return False
    return one is other or one.describe() == other.describe()
