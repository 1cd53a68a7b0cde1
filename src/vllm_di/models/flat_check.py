"""Whether transformers' code for a model may run in flat steps, by evidence.

Two sequences go through the model as a step would carry them: one behind the other, one in two
chunks and a decode, the other at the far end of the context. Each token's state must be the one
that the model's own forward gives. Layers that keep state of their own, sequences that see each
other and settings that reach no attention show as a difference. Windows are too long to be run: the
masks that the model would make are compared at far positions instead.

All runs in fp32. The weights stay as they are: a layer's (or a table's) are widened while it runs,
so that the check takes the memory of one layer in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vllm_di.components import products
from vllm_di.components.interfaces import AttentionSpec
from vllm_di.components.ops.torch import softmax_with_sinks
from vllm_di.errors import UnsupportedModelError
from vllm_di.models.hf_attention import NAME, STEP, Step, attend, spec_of

MASKS = "vllm_di_masks"
"""Of the attention that compares masks."""
LENGTH = 12
"""Tokens of each of the two sequences: a multiple of the amplitudes."""
CHUNKS = ((6, 10), (5, 1), (1, 1))
"""Tokens of each in three steps."""
TOLERANCE = 1e-4
"""Of the largest element: fp32 rounding stays below a tenth of it in the families that run, and
the faults that were tried (state of another sequence, a mask, a cap) lie above 1e-2."""
AMPLITUDES = (1e-3, 1.0, 1e3)
"""Factors of the head's input: a cap or any other bend of the logits shows between them."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the model does beside the product with its head: ``bend(head(hidden * before))``."""

    before: float = 1.0
    factor: float = 1.0
    cap: float | None = None

    def bend(self, logits: Tensor) -> Tensor:
        """fp32 logits as the model would give them."""
        out = logits if self.factor == 1.0 else logits * self.factor
        return out if self.cap is None else self.cap * torch.tanh(out / self.cap)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a model that passes was seen to do."""

    head: Head
    specs: dict[int, AttentionSpec]
    """What each layer asks of attention."""
    uneven: set[tuple[int, int]]
    """Elements of a head's keys and of its values, where they differ."""


def check_flat_steps(model: Any, num_layers: int, max_model_len: int) -> Evidence:
    """Raises UnsupportedModelError that says what differs. The model's implementation of attention
    is ours afterwards."""
    register()
    with torch.no_grad(), widened(model):
        model.set_attn_implementation("eager")
        vocab = int(model.get_input_embeddings().weight.shape[0])
        device = model.get_input_embeddings().weight.device
        far = max(0, max_model_len - LENGTH)
        ids = [
            (torch.arange(LENGTH, dtype=torch.int64, device=device) * 7919 + 13 * n + 5) % vocab
            for n in (0, 1)
        ]
        places = [
            torch.arange(LENGTH, dtype=torch.int64, device=device) + start for start in (0, far)
        ]
        own = [_own(model, i, p) for i, p in zip(ids, places, strict=True)]
        model.set_attn_implementation(NAME)
        flat = _flat(model, ids, places, num_layers)
        before = _same_states([states for states, _, _ in own], flat)
        head = _head(own, before)
        model.set_attn_implementation(MASKS)
        masks = _masks(model, ids[0], places[0], max_model_len)
    model.set_attn_implementation(NAME)
    return Evidence(head, masks.specs, {pair for pair in masks.sizes if pair[0] != pair[1]})


def register() -> None:
    """Make our attention known to transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_ATTENTION_FUNCTIONS.register(MASKS, _compare_mask)
    ALL_MASK_ATTENTION_FUNCTIONS.register(MASKS, _make_mask)


# ------------------------------------------------------------------------------------------------
# the runs


def _own(model: Any, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own forward of one sequence -> (what its head was given, the head's output for
    that times AMPLITUDES in turn, what the model made of it), each [tokens, ...]."""
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError("it has no head of its own")
    kept: list[Tensor] = []
    turns = torch.tensor(AMPLITUDES, dtype=torch.float32, device=ids.device)
    turns = turns.repeat(LENGTH)[:LENGTH, None]

    def before(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(given[0])
        return (given[0] * turns.to(given[0]), *given[1:])

    def after(_: nn.Module, __: Any, out: Tensor) -> None:
        kept.append(out.clone())

    with ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(before).remove)
        stack.callback(head.register_forward_hook(after).remove)
        logits = model(input_ids=ids[None], position_ids=places[None], use_cache=False).logits
    if len(kept) != 2:
        raise UnsupportedModelError("its forward does not call its head once")
    return kept[0][0].float(), kept[1][0].float(), logits[0].float()


def body_of(model: Any) -> Any:
    """The part of a causal model that ends in states. Raises UnsupportedModelError."""
    from transformers import PreTrainedModel

    body = model.base_model
    if body is model:  # some classes name another part than they have
        body = next((part for part in model.children() if isinstance(part, PreTrainedModel)), None)
    if body is None:
        raise UnsupportedModelError("transformers does not tell its body from its head")
    return body


def _flat(model: Any, ids: list[Tensor], places: list[Tensor], layers: int) -> list[Tensor]:
    """The same tokens in steps of both sequences -> their states [tokens, hidden], one each."""
    caches: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(layers)]
    states: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for counts in CHUNKS:
        spans = [slice(d, d + n) for d, n in zip(done, counts, strict=True)]
        step = Step(DenseAttention(), caches, [counts] * layers)
        out = body_of(model)(
            input_ids=torch.cat([i[s] for i, s in zip(ids, spans, strict=True)])[None],
            position_ids=torch.cat([p[s] for p, s in zip(places, spans, strict=True)])[None],
            use_cache=False,
            **{STEP: step},
        ).last_hidden_state[0]
        for n, part in enumerate(out.split(list(counts))):
            states[n].append(part)
        done = [span.stop for span in spans]
    if not any(caches):
        raise UnsupportedModelError("its layers do not call attention through the interface")
    return [torch.cat(parts).float() for parts in states]


class DenseAttention:
    """Reference for a handful of tokens: ``metadata`` says how many belong to each sequence, a
    layer's cache holds each sequence's keys and values."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, metadata: Any, spec: AttentionSpec
    ) -> Tensor:
        parts = []
        for n, (query, *new) in enumerate(
            zip(*(x.split(list(metadata)) for x in (q, k, v)), strict=True)
        ):
            if n in cache:
                new = [torch.cat(pair) for pair in zip(cache[n], new, strict=True)]
            cache[n] = tuple(new)
            keys, values = (x.repeat_interleave(spec.num_heads // x.shape[1], 1) for x in new)
            scores = products.einsum("qhd,khd->hqk", query, keys) * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            at = torch.arange(len(keys), dtype=torch.int64, device=q.device)
            seen = _visible(at[-len(query) :, None], at, spec.window)
            scores = scores.masked_fill(~seen, float("-inf"))[:, None]  # [heads, 1, queries, keys]
            scores = softmax_with_sinks(scores, spec.sinks)[:, 0]
            parts.append(products.einsum("hqk,khd->qhd", scores, values))
        return torch.cat(parts)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    causal = key <= query
    return causal if window is None else causal & (key > query - window)


# ------------------------------------------------------------------------------------------------
# what is compared


def _factor(ours: Tensor, theirs: Tensor) -> float:
    """The f for which ours times f comes nearest to theirs; 1 where it is that but for rounding."""
    factor = float((ours * theirs).sum() / (ours * ours).sum())
    return 1.0 if abs(factor - 1) < TOLERANCE else factor


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, as a share of the largest element. NaN counts as infinite."""
    share = float((ours - theirs).abs().max() / theirs.abs().max())
    return share if share == share else float("inf")


def _same_states(own: list[Tensor], flat: list[Tensor]) -> float:
    """-> the factor between the model's last states and what its head is given."""
    factor = _factor(torch.cat(flat), torch.cat(own))
    for theirs, ours in zip(own, flat, strict=True):
        if (difference := _difference(ours * factor, theirs)) > TOLERANCE:
            raise UnsupportedModelError(
                "sequences that share a step, come in chunks or lie far along get other states "
                f"than alone (they differ by {difference:.1g} of the largest element): it has "
                "layers whose state, mask or position does not go through attention"
            )
    return factor


def _head(own: list[tuple[Tensor, Tensor, Tensor]], before: float) -> Head:
    """What the model does to its head's output: a factor, or a factor and a soft cap."""
    out, logits = (torch.cat([run[n] for run in own]) for n in (1, 2))
    small, large = (slice(AMPLITUDES.index(a), None, len(AMPLITUDES)) for a in (1e-3, 1e3))
    rows = [torch.arange(len(out), dtype=torch.int64)[part] for part in (small, large)]
    factor = _factor(out[rows[0]], logits[rows[0]])
    for cap in (None, float(logits[rows[1]].abs().max())):
        head = Head(before, factor, cap)
        bent = head.bend(out)
        if all(_difference(b, t) <= TOLERANCE for b, t in zip(bent, logits, strict=True)):
            return head
    raise UnsupportedModelError("it changes its logits after the head in a way of its own")


# ------------------------------------------------------------------------------------------------
# masks


@dataclass(slots=True)
class Masks:
    """What a run that compares masks knows and finds; it goes in a step's place."""

    max_model_len: int
    specs: dict[int, AttentionSpec] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    """Elements of a head's keys and of its values."""


def _masks(model: Any, ids: Tensor, places: Tensor, max_model_len: int) -> Masks:
    """Run with an attention that compares each layer's mask to what ours takes it for -> what each
    layer asks of attention."""
    masks = Masks(max_model_len)
    body_of(model)(input_ids=ids[None], position_ids=places[None], use_cache=False, **{STEP: masks})
    return masks


def _make_mask(*args: Any, mask_function: Callable[..., Tensor], **kwargs: Any) -> Any:
    """transformers' mask interface: eager's mask, which remembers the rule that it was made by."""
    from transformers.masking_utils import eager_mask

    mask: Any = eager_mask(*args, mask_function=mask_function, **kwargs)
    if mask is not None:
        mask.rule = mask_function
    return mask


def _compare_mask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: compares, and lets the values through."""
    masks: Masks = more[STEP]
    spec = spec_of(module, query, key, value, more)
    masks.sizes.add((key.shape[-1], value.shape[-1]))
    if masks.specs.setdefault(module.layer_idx, spec) != spec:
        raise UnsupportedModelError(f"layer {module.layer_idx} attends in two ways")
    if attention_mask is not None:
        base = attention_mask if attention_mask._base is None else attention_mask._base
        rule = getattr(attention_mask, "rule", None) or getattr(base, "rule", None)
        if rule is None:
            raise UnsupportedModelError("its layers get a mask that is not transformers' own")
        _compare_rule(rule, spec.window, masks.max_model_len, query.device)
    out = value.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)
    return out.transpose(1, 2).contiguous(), None


def _compare_rule(
    rule: Callable[..., Tensor], window: int | None, length: int, device: torch.device
) -> None:
    """Which keys a query sees, at every power of two and at the window's edges. (A narrower rule of
    any kind hides position 0 from the last.)"""
    edges = {0, *(w for n in (1, 2, 3) if window for w in (n * window,))}
    edges |= {2**n for n in range(length.bit_length() + 1)}
    near = {e + d for e in edges for d in (-1, 0, 1)} | {length - 1}
    at = torch.tensor(sorted(p for p in near if 0 <= p < length), dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)[:, None, None, None]
    try:
        seen = rule(zero, zero, at[None, None, :, None], at[None, None, None, :])[0, 0]
    except IndexError:
        raise UnsupportedModelError("its masks depend on the tokens") from None
    apart = (seen != _visible(at[:, None], at, window)).nonzero()
    if len(apart):
        query, key = (int(at[n]) for n in apart[0])
        raise UnsupportedModelError(
            f"its mask at query {query}, key {key} is not that of causal attention"
            + (f" with a window of {window}" if window else "")
        )


# ------------------------------------------------------------------------------------------------
# fp32


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Floating-point parameters are fp32 while the module that has them runs, and what they were
    after it. Layers are widened whole, other modules by their own parameters."""
    with ExitStack() as stack:
        whole: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and module not in whole:
                for layer in module:
                    whole |= set(layer.modules())
                    _widen(layer, recurse=True, stack=stack)
            elif module not in whole:
                _widen(module, recurse=False, stack=stack)
        yield


def _widen(module: nn.Module, *, recurse: bool, stack: ExitStack) -> None:
    narrow = [
        p for p in module.parameters(recurse) if p.is_floating_point() and p.dtype != torch.float32
    ]
    if not narrow:
        return
    kept: list[list[Tensor]] = []

    def before(*_: Any) -> None:
        kept.append([p.data for p in narrow])
        for p in narrow:
            p.data = p.data.float()

    def after(*_: Any) -> None:
        for p, data in zip(narrow, kept.pop(), strict=True):
            p.data = data

    stack.callback(_restore, kept, narrow)
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def _restore(kept: list[list[Tensor]], narrow: list[nn.Parameter]) -> None:
    """Put back what an error left widened."""
    while kept:
        for p, data in zip(narrow, kept.pop(), strict=True):
            p.data = data
