"""The layers of the native decoder. Each holds this rank's share of its weights and knows how a
checkpoint's tensors fill it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_di.components.interfaces import Activation, Communicator, Quantization, WeightPart
from vllm_di.components.quantized import QuantizedWeight
from vllm_di.errors import ConfigError
from vllm_di.models.tensors import Kind


@dataclass(frozen=True, slots=True)
class Cut:
    """How the ranks share out a target, and the tensor that holds this rank's share."""

    held: Callable[[], Tensor | None]
    """None where the weight was packed in another form."""
    dim: int | None = None
    num_shards: int = 1
    offset: float = 0.0
    first_rank_only: bool = False
    row_counts: tuple[int, ...] = ()
    """Of a target that is several weights, one below the other; each with its ``shards``."""
    shards: tuple[int, ...] = ()

    def parts(self, name: str, rows: int) -> Iterator[WeightPart]:
        start = 0
        counts, shards = self.row_counts or (rows,), self.shards or (self.num_shards,)
        for count, number in zip(counts, shards, strict=True):
            yield WeightPart(
                name, start, count, self.dim, number, self.offset, self.first_rank_only
            )
            start += count


@dataclass(frozen=True, slots=True)
class Target:
    """Where one tensor of a checkpoint goes."""

    shape: tuple[int, ...]
    """As it stands in the checkpoint, whole."""
    fill: Callable[[Any], None]
    """Copies this rank's share of a Tensor or, with ``quantized``, of a QuantizedWeight."""
    kind: Kind = "weight"
    """``norm`` starts at one in a random model, ``weight`` at random, ``bias`` at zero."""
    quantized: bool = False
    """Whether it takes a QuantizedWeight as it is."""
    cut: Cut | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's share of one dimension."""

    whole: int
    start: int
    size: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def count(self) -> int:
        """Into how many shares the whole is cut."""
        return self.whole // self.size


def shard(size: int, rank: int, world: int, what: str) -> Shard:
    """An equal share of ``size``. Raises ConfigError when it does not divide."""
    if size % world:
        raise ConfigError(
            f"{what} ({size}) cannot be split over {world} ranks; "
            "choose a tensor_parallel_size that divides it",
            key="executor.tensor_parallel_size",
        )
    return Shard(size, rank * size // world, size // world)


def shard_heads(heads: int, head_size: int, rank: int, world: int, what: str) -> Shard:
    """Whole heads. With fewer heads than ranks, several ranks hold the same head."""
    if heads >= world:
        share = shard(heads, rank, world, what)
        return Shard(heads * head_size, share.start * head_size, share.size * head_size)
    if world % heads:
        raise ConfigError(
            f"{what} ({heads}) cannot be shared by {world} ranks; "
            "choose a tensor_parallel_size that is a multiple or a divisor of it",
            key="executor.tensor_parallel_size",
        )
    return Shard(heads * head_size, rank // (world // heads) * head_size, head_size)


class Linear(nn.Module):
    """One or more products with the same input, as one: outputs stand side by side.

    ``outputs`` shard the rows of each; ``inputs`` shards the columns of all. ``adds_bias`` is false
    where another rank adds the bias to the sum. After ``finalize``, ``run`` is the product, x
    [tokens, in] -> [tokens, out], and the loaded weight is gone.
    """

    run: Callable[[Tensor], Tensor]

    def __init__(
        self,
        outputs: list[Shard],
        inputs: Shard,
        *,
        bias: bool,
        adds_bias: bool = True,
        activation: Activation | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.outputs, self.inputs, self.has_bias = outputs, inputs, bias
        self.activation, self.is_gated = activation, False
        rows = sum(s.size for s in outputs)
        self.weight: Tensor | None = torch.empty(rows, inputs.size, dtype=dtype, device=device)
        self.bias = torch.empty(rows, dtype=dtype, device=device) if bias and adds_bias else None
        self.num_bytes = 0
        self._loaded: Callable[[], Tensor | None] = lambda: self.weight
        self._quantized: dict[int, QuantizedWeight] = {}
        """Parts of the weight that came quantised, by their first row."""

    def targets(self, names: list[str]) -> dict[str, Target]:
        """Targets of ``NAME.weight`` and ``NAME.bias`` for each output."""
        found: dict[str, Target] = {}
        offset = 0
        for name, output in zip(names, self.outputs, strict=True):
            place = slice(offset, offset + output.size)
            shape = (output.whole, self.inputs.whole)
            found[f"{name}.weight"] = Target(
                shape, self._filler(place, output), quantized=True, cut=self._cut([output])
            )
            if self.has_bias:
                found[f"{name}.bias"] = Target(
                    (output.whole,),
                    self._bias_filler(place, output),
                    "bias",
                    cut=Cut(
                        lambda: self.bias,
                        0 if output.count > 1 else None,
                        output.count,
                        first_rank_only=self.inputs.count > 1,
                    ),
                )
            offset += output.size
        return found

    def _cut(self, outputs: list[Shard]) -> Cut:
        if self.inputs.count > 1:
            dim, shards = 1, [self.inputs.count] * len(outputs)
        else:
            dim, shards = 0, [output.count for output in outputs]
        return Cut(
            lambda: self._loaded(),
            dim if max(shards) > 1 else None,
            row_counts=tuple(output.whole for output in outputs),
            shards=tuple(shards),
        )

    def fused_target(self, name: str) -> dict[str, Target]:
        """Target of one tensor that holds all outputs, one below the other."""
        rows = sum(s.whole for s in self.outputs)
        parts = list(self.targets([str(i) for i in range(len(self.outputs))]).values())

        def fill(tensor: Tensor | QuantizedWeight) -> None:
            start = 0
            for part, output in zip(parts, self.outputs, strict=True):
                span = slice(start, start + output.whole)
                piece = tensor.rows(span) if isinstance(tensor, QuantizedWeight) else tensor[span]
                part.fill(piece)
                start += output.whole

        shape = (rows, self.inputs.whole)
        return {f"{name}.weight": Target(shape, fill, quantized=True, cut=self._cut(self.outputs))}

    def _filler(self, place: slice, output: Shard) -> Callable[[Any], None]:
        def fill(tensor: Tensor | QuantizedWeight) -> None:
            assert self.weight is not None
            if isinstance(tensor, QuantizedWeight):
                share = tensor.rows(output.span).columns(self.inputs.span)
                self._quantized[place.start] = share
            else:
                self.weight[place].copy_(tensor[output.span, self.inputs.span])

        return fill

    def _bias_filler(self, place: slice, output: Shard) -> Callable[[Tensor], None]:
        def fill(tensor: Tensor) -> None:
            if self.bias is not None:
                self.bias[place].copy_(tensor[output.span])

        return fill

    @property
    def is_mixed(self) -> bool:
        """Whether some parts of the weight came quantised and some in floats, or in several
        orders."""
        parts = list(self._quantized.values())
        whole = len(parts) in (0, len(self.outputs))
        return not whole or (bool(parts) and not QuantizedWeight.are_alike(parts))

    def finalize(self, quantization: Quantization) -> None:
        """Hand the weight over; the original is dropped."""
        assert self.weight is not None
        fused = None
        weight: Tensor | QuantizedWeight = self.weight
        if self._quantized and not self.is_mixed:
            weight = QuantizedWeight.join([part for _, part in sorted(self._quantized.items())])
        else:
            for start, part in self._quantized.items():
                self.weight[start : start + part.shape[0]] = part.dequantize(self.weight.dtype)
        if self.activation is not None:
            fused = quantization.gated_linear(weight, self.bias, self.activation)
            self.is_gated = fused is not None
        self.run = fused or quantization.linear(weight, self.bias)
        self.num_bytes = quantization.num_bytes(weight)
        self.num_bytes += 0 if self.bias is None else self.bias.nbytes
        # if it lives on, then as what is multiplied with
        self._loaded = weakref.ref(weight) if isinstance(weight, Tensor) else lambda: None
        self.weight, self._quantized = None, {}

    def release(self) -> None:
        """Drop the weight, which is finalised."""
        del self.run


class Norm(nn.Module):
    """The weight of an RMS norm. ``offset`` is added once, after loading (Gemma stores weight -
    1)."""

    def __init__(
        self, size: int, *, offset: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.offset = offset
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def targets(self, name: str) -> dict[str, Target]:
        def fill(tensor: Tensor) -> None:
            self.weight.copy_(tensor.float() + self.offset)

        cut = Cut(lambda: self.weight, offset=self.offset)
        return {f"{name}.weight": Target((len(self.weight),), fill, "norm", cut=cut)}


class VocabParallel(nn.Module):
    """Rows of the vocabulary shared out over the ranks, padded to equal shares."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        communicator: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.vocab_size, self._communicator = vocab_size, communicator
        self.rows = -(-vocab_size // communicator.world_size)
        self.start = communicator.rank * self.rows
        self.weight: Tensor = torch.zeros(self.rows, hidden_size, dtype=dtype, device=device)
        self.run: Callable[[Tensor], Tensor] | None = None
        self.packed_embed: Callable[[Tensor], Tensor] | None = None
        """Reads rows of the packed head, where that replaces the table ``weight``."""
        self.num_bytes = self.weight.nbytes
        self._loaded: Callable[[], Tensor | None] = lambda: self.weight
        self._quantized: QuantizedWeight | None = None

    def targets(self, name: str) -> dict[str, Target]:
        def fill(tensor: Tensor | QuantizedWeight) -> None:
            span = slice(self.start, self.start + self.rows)
            if isinstance(tensor, QuantizedWeight):
                if self._communicator.world_size == 1:
                    self._quantized = tensor
                tensor = tensor.rows(span).dequantize(self.weight.dtype)
            else:
                tensor = tensor[span]
            self.weight[: len(tensor)].copy_(tensor)

        shape, world = (self.vocab_size, self.weight.shape[1]), self._communicator.world_size
        cut = Cut(lambda: self._loaded(), 0 if world > 1 else None, world)
        return {f"{name}.weight": Target(shape, fill, quantized=True, cut=cut)}

    def finalize(self, quantization: Quantization, *, embeds: bool) -> None:
        """Make it a head: ``logits`` can run. What embeds tokens too keeps its table where packed
        rows cannot be read in its place."""
        weight = self.weight if self._quantized is None else self._quantized
        self._loaded = weakref.ref(self.weight)
        self.num_bytes = quantization.num_bytes(weight)
        if embeds:
            dtype = self.weight.dtype
            self.run, self.packed_embed = quantization.tied_linear(weight, dtype, torch.float32)
        else:
            self.run = quantization.linear(weight, None, torch.float32)
        if embeds and self.packed_embed is None:
            self.num_bytes += self.weight.nbytes
        else:
            self._drop_table()
        self._quantized = None

    def release(self) -> None:
        """Drop the weight."""
        self._drop_table()
        self.run = self.packed_embed = None

    def _drop_table(self) -> None:
        self.weight = self.weight[:0].clone()  # a view would hold the whole of it

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab], whole on every rank."""
        assert self.run is not None
        share = self.run(hidden)
        if self._communicator.world_size == 1:
            return share
        return self._communicator.all_gather(share, -1)[:, : self.vocab_size]

    def embed(self, ops_embedding: Callable[[Tensor, Tensor], Tensor], token_ids: Tensor) -> Tensor:
        """token_ids [tokens] -> [tokens, hidden]."""
        rows_of = self.packed_embed or (lambda ids: ops_embedding(ids, self.weight))
        if self._communicator.world_size == 1:
            return rows_of(token_ids)
        local = token_ids - self.start
        here = (local >= 0) & (local < self.rows)
        rows = rows_of(local.clamp(0, self.rows - 1)) * here[:, None]
        return self._communicator.all_reduce(rows)
