"""Every causal class that the installed transformers has, tiny: which run on its code with our
attention, and which are refused.

    python -m tests.models.families docs/transformers-models.md
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.models.runner import BLOCK, attention, device, ops
from torch import Tensor

from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import BatchPlan, ModelStep, Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.safetensors import find_files, read_files
from vllm_di.errors import UnsupportedModelError, VllmDiError
from vllm_di.models.checkpoint import describe
from vllm_di.models.config import DecoderConfig
from vllm_di.models.hf_config import FAMILIES, model_fields
from vllm_di.models.transformers_fallback import TransformersModel

LENGTH = 256
WINDOW = 7
SMALL: dict[str, Any] = {
    **dict.fromkeys(["vocab_size"], 128),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "dim_model", "emb_dim"], 64),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"],
        96,
    ),
    **dict.fromkeys(["n_inner", "dff", "dim_ff", "feed_forward_size", "mlp_dim"], 96),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers"], 4),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(
        ["num_key_value_heads", "num_kv_heads", "n_head_kv", "swa_num_key_value_heads"], 2
    ),
    **dict.fromkeys(["head_dim", "attention_head_dim", "d_head", "d_kv", "global_head_dim"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], LENGTH),
    **dict.fromkeys(
        ["sliding_window", "attention_chunk_size", "attention_window", "window_size"], WINDOW
    ),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_k", "moe_topk", "experts_per_token", "top_k_experts"], 2
    ),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(
        ["moe_ffn_hidden_size", "expert_ffn_hidden_size", "shared_intermediate_size"], 32
    ),
    **dict.fromkeys(["n_group", "topk_group", "n_groups", "mamba_n_groups", "n_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["q_lora_rank"], 24),
    **dict.fromkeys(["kv_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim"], 8),
    **dict.fromkeys(["qk_head_dim"], 16),
    **dict.fromkeys(["v_head_dim"], 12),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_expand"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["pad_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "decoder_start_token_id"], 1),
    **dict.fromkeys(["eos_token_id"], 2),
    **dict.fromkeys(["vocab_size_per_layer_input"], 128),
    **dict.fromkeys(["hidden_size_per_layer_input"], 16),
}
"""What a config is made small by, wherever it has the key."""
UNSET = ("head_dim", "num_key_value_heads")
"""Made small where the default leaves them to the class, too."""
QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 100,
    "hc_lowrank": 8,
}
CHANGES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "mamba2": {"num_heads": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "bailing_hybrid": {
        "n_group": 1,
        "topk_group": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "inkling2_text": {"unpadded_vocab_size": 128},
    "inkling2_loop_text": {"unpadded_vocab_size": 128},
    "kimi_linear": {"num_experts_per_token": 2, "topk_group": 1, "num_expert_group": 1},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
"""By model type, where that is not enough."""


NOT_BUILT = ("gemma3n", "gemma4_assistant", "musicgen", "musicgen_melody")
"""The class that transformers names for these does not take their config, or needs packages that
are not there: a config alone is tried."""
NOT_ALONE = ("gemma4_unified_assistant",)
"""These read another model's cache: token ids alone do not run them."""


NOT_TRIED = ("blt", "dots3_note")
"""No small config of these was found. They meet the same check when they are loaded."""


class Outcome(NamedTuple):
    """What became of one class."""

    model_type: str
    architecture: str
    why: str
    """Empty where it is equal; else our refusal."""
    attention: str = "paged"
    """With which attention it is equal."""


def model_types() -> dict[str, str]:
    """model_type to class name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> Any:
    """A small config that has every kind of layer that the class's default has."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind()
    config = kind(**_shrunk(default, CHANGES.get(model_type, {})))
    config.architectures = [model_types()[model_type]]
    return config


def _shrunk(default: Any, changes: dict[str, Any]) -> dict[str, Any]:
    values = default.to_dict()
    aliases = getattr(default, "attribute_map", {})
    small: dict[str, Any] = {}
    for name in {*values, *aliases}:
        asked = values.get(name) is not None or name.endswith("_token_id") or name in UNSET
        if name in SMALL and asked and aliases.get(name) not in values:
            small[name] = SMALL[name]
        nested = getattr(default, name, None) if isinstance(values.get(name), dict) else None
        if hasattr(nested, "to_dict"):
            small[name] = _shrunk(nested, changes.get(name, {}))
    if "qk_rope_head_dim" in values:  # latent attention: every head has keys of its own
        small |= {n: 4 for n in ("num_key_value_heads",) if n in values}
        small |= {n: 8 for n in ("head_dim",) if n in values}
    kinds = values.get("layer_types")
    if isinstance(kinds, list):
        some = sorted(set(kinds), key=kinds.index)
        small["layer_types"] = (some * 4)[: max(4, len(some))]
    nested_changes = {n for n, v in changes.items() if isinstance(v, dict) and n in small}
    return small | {n: v for n, v in changes.items() if n not in nested_changes}


def make(model_type: str, folder: Path) -> Any:
    """Save a random checkpoint; returns transformers' model in fp32."""
    import transformers

    config = tiny_config(model_type)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shake(model)
    model.config.architectures = config.architectures
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def shake(model: Any) -> None:
    """Fresh norms and biases are ones and zeros, and small matrices say little."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
    model.tie_weights()


def steps() -> list[list[list[int]]]:
    """The tokens of TOKENS in steps: chunks of both, then single tokens."""
    cuts = [(0, 0), (19, 40), (40, 41), *((40 + i, 41 + i) for i in range(1, 20)), (60, 60)]
    return [[TOKENS[n][a[n] : b[n]] for n in (0, 1)] for a, b in itertools.pairwise(cuts)]


def run(model: TransformersModel, parts: list[list[list[int]]]) -> list[Tensor]:
    """Steps of tokens for each sequence -> each sequence's logits [tokens, vocab]."""
    layout = HndLayout(device(), block_size=BLOCK, dtype="auto")
    backend = model._attention
    blocks = LENGTH // BLOCK
    caches = layout.allocate(model.kv_specs(), blocks * len(parts[0]), torch.float32)
    table = torch.randperm(blocks * len(parts[0]), generator=torch.Generator().manual_seed(0))
    table = table.to(torch.int32).view(len(parts[0]), blocks)
    lengths, logits = [0] * len(parts[0]), [[] for _ in parts[0]]  # type: ignore[var-annotated]
    for step in parts:
        counts = [len(tokens) for tokens in step]
        places = [torch.arange(n, n + c) for n, c in zip(lengths, counts, strict=True)]
        lengths = [n + c for n, c in zip(lengths, counts, strict=True)]
        slots = [table[i, p // BLOCK].long() * BLOCK + p % BLOCK for i, p in enumerate(places)]
        plan = BatchPlan(
            token_ids=torch.tensor([t for tokens in step for t in tokens]),
            positions=torch.cat(places),
            query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            slot_mapping=torch.cat(slots),
            logits_rows=torch.arange(sum(counts)),
            query_lens_host=counts,
            seq_lens_host=lengths,
        )
        with torch.inference_mode():
            given = ModelStep(
                token_ids=plan.token_ids,
                positions=plan.positions,
                caches=caches,
                groups=[0] * len(caches),
                metadata=[backend.build(plan)],
            )
            out = model.forward(given)
            for i, part in enumerate(model.logits(out).split(counts)):
                logits[i].append(part)
    return [torch.cat(part) for part in logits]


def load(
    folder: Path,
    dtype: str = "float32",
    *,
    max_model_len: int = LENGTH,
    random: bool = False,
    kind: str = "paged",
) -> TransformersModel:
    """The checkpoint on transformers' code and our attention. Raises VllmDiError."""
    found = describe(str(folder))
    fields = model_fields(found.hf_config, found.generation_config, native=False)
    fields["max_model_len"] = max_model_len
    fields.pop("max_position_embeddings", None)
    config = DecoderConfig(path=str(folder), dtype=dtype, **fields)
    on = device()
    table = ops("torch", on)
    backend = attention(kind, table, HndLayout(on, block_size=BLOCK, dtype="auto"))
    model = TransformersModel(on, backend, SingleCommunicator(Placement()), config=config)
    if random:
        model.load_random(0)
    else:
        model.load_weights(read_files(find_files(folder)))
    return model


TOKENS = [[(7 * i * i + 3 * i + n) % 97 + 3 for i in range(60)] for n in (0, 1)]


@torch.no_grad()
def own_logits(model: Any) -> list[Tensor]:
    """transformers' own, of each sequence alone [tokens, vocab]."""
    whole = [model(input_ids=torch.tensor([t]), use_cache=False).logits[0] for t in TOKENS]
    assert all(bool(logits.isfinite().all()) for logits in whole), "the tiny model overflows"
    return whole


def outcome(model_type: str) -> Outcome:
    """Equal, or our refusal. Anything else raises: another error, or other logits."""
    architecture = model_types()[model_type]
    with tempfile.TemporaryDirectory() as scratch:
        want = None
        if model_type in NOT_BUILT:
            config = {"model_type": model_type, "architectures": [architecture], "vocab_size": 128}
            (Path(scratch) / "config.json").write_text(json.dumps(config))
        else:
            theirs = make(model_type, Path(scratch))
            theirs.set_attn_implementation("eager")
            want = None if model_type in NOT_ALONE else own_logits(theirs)
        for kind in ("paged", "sdpa"):
            refusal = ""
            try:
                load(Path(scratch), "bfloat16", kind=kind)
                ours = load(Path(scratch), kind=kind)
            except UnsupportedModelError as error:
                refusal = str(error)
            if "attention=sdpa does" not in refusal:
                break
    if refusal:
        name, _, why = refusal.partition(" is refused: ")
        assert name == architecture, refusal
        return Outcome(model_type, architecture, why.split("; native are")[0])
    assert want is not None, f"{model_type} runs alone"
    got = run(ours, steps())
    for one, other in zip(got, want, strict=True):
        share = float((one - other).abs().max() / other.abs().max())
        assert share < 1e-4, f"{model_type}: logits differ by {share:.2g} of the largest"
    return Outcome(model_type, architecture, "", kind)


PAGE = Path(__file__).parents[2] / "docs/transformers-models.md"


def recorded() -> dict[str, Outcome]:
    """What the page says, by model type."""
    rows = re.findall(r"^\| (\S+) \| (\w+)(?:\\\*)? \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    found: dict[str, Outcome] = {}
    for name, architecture, text in rows:
        if name == "model_type":
            continue
        equal, _, kind = text.partition(" with attention=")
        why = "" if equal == "equal" else text.removeprefix("refused: ")
        found[name] = Outcome(name, architecture, why, "paged" if why else kind or "paged")
    return found


INTRODUCTION = f"""\
An architecture without a native model runs on transformers' code with our attention and cache, or
is refused when it is loaded. Evidence decides, not this list: each load compares two sequences that
share steps with the model's own forward, in fp32 whatever the model's dtype, within 1e-4 of the
largest element, and the masks of its layers with what our attention takes them for
(`models/flat_check.py`). One layer at a time is widened to fp32, so that the check takes the memory
of one layer (or table) beside the model.

Latent attention (MLA) runs uncompressed: the KV cache holds keys and values, both with the elements
of the wider ones, not the latent that they are made from. The log says so. Attention sinks take
`attention=sdpa`, and are refused with a backend that does not take them.

`make test-families` finds this for the causal classes of transformers {{version}}: small models
with random weights, contexts of {LENGTH} tokens, windows of {WINDOW}. {{equal}} of {{tried}} give
equal logits in chunks, decodes and shared steps; the others are refused by name. Architectures with
a native model are marked \\*; they run on our own decoder unless
`model.implementation=transformers` asks for this one. Not tried, for want of a small config:
{{absent}}.
"""


def page(outcomes: list[Outcome]) -> str:
    """The table as Markdown."""
    import transformers

    equal = [o for o in outcomes if not o.why]
    lines = [
        "# Models on transformers' code",
        "",
        INTRODUCTION.format(
            version=transformers.__version__,
            equal=len(equal),
            tried=len(outcomes),
            absent=", ".join(NOT_TRIED),
        ),
        "| model_type | class | |",
        "|---|---|---|",
    ]
    for o in outcomes:
        star = "\\*" if o.architecture in FAMILIES else ""
        yes = "equal" if o.attention == "paged" else f"equal with attention={o.attention}"
        why = yes if not o.why else "refused: " + o.why.replace("|", "\\|").replace("`", "'")
        lines.append(f"| {o.model_type} | {o.architecture}{star} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or with ``-`` and model types show what becomes of them."""
    warnings.simplefilter("ignore")
    place, *names = sys.argv[1:]
    found: list[Outcome] = []
    failed = 0
    for name in names or [n for n in model_types() if n not in NOT_TRIED]:
        try:
            found.append(outcome(name))
            print(*found[-1], sep=" | ", flush=True)  # noqa: T201
        except Exception as error:
            failed += 1
            kind = "OURS" if isinstance(error, VllmDiError) else type(error).__name__
            print(f"!!! {name}: {kind}: {str(error)[:300]}", flush=True)  # noqa: T201
    if place != "-" and not failed:
        Path(place).write_text(page(found), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
