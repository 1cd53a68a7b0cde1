"""Every mutant: the overrides that put it in its place, its killers, and what these must say."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

BASE = (
    "platform=cpu",
    "ops=torch",
    "attention=paged",
    "graph=eager",
    "device.threads=1",
    "device.default_dtype=float32",
    "trust=[tests]",
)
HERE = "tests.conformance.mutants"
OPTIONS = str(Path(__file__).with_name("conf"))


class Mutant(NamedTuple):
    name: str
    overrides: tuple[str, ...]
    killers: tuple[str, ...]
    """Cases that must fail."""
    reason: str
    """Regular expression: what each of them must say."""
    base: tuple[str, ...] = BASE
    """What it is put into."""
    config_dirs: tuple[str, ...] = ()
    """Folders with options of its own."""


def _own_quantization(option: str, reason: str, *killers: str) -> Mutant:
    """A quantization under a name that the suite has never heard of."""
    claim = f"++platform.capabilities.quantization=[{option}]"
    return Mutant(f"quantization={option}", (claim,), killers, reason, config_dirs=(OPTIONS,))


def _ops(cls: str, op: str, reason: str, *more: str, dtype: str = "float32") -> Mutant:
    """A library with a wrong op."""
    killers = (f"ops/test_op[{op}-{dtype}]", *more)
    return Mutant(cls, (f"ops.library._target_={HERE}.ops.{cls}",), killers, reason)


def _attention(cls: str, reason: str, *killers: str) -> Mutant:
    target = f"ops.library._target_={HERE}.attention.{cls}"
    return Mutant(cls, (target,), killers, reason)


def _slot(slot: str, place: str, reason: str, *killers: str, more: tuple[str, ...] = ()) -> Mutant:
    """A component: ``module.Class`` in its slot."""
    return Mutant(place, (f"{slot}._target_={HERE}.{place}", *more), killers, reason)


def _pooler(option: str, place: str, reason: str, killer: str) -> Mutant:
    """A pooler in place of that of an option."""
    return _slot("pooler", place, reason, f"pooling/{killer}", more=(f"pooler={option}",))


LOGPROBS = "logprobs/test_logprobs[{}-float32]"
GOLDEN = "golden/test_tokens[gqa-float32]"
OFF = "Tensor-likes are not close|cosine"

OPS = (
    _ops("EpsMissing", "rms_norm", OFF),
    _ops("SilentCast", "rms_norm", f"rms_norm.*({OFF})"),
    _ops("NanSwallowed", "rms_norm", "do not propagate"),
    _ops("StaleResidual", "add_rms_norm", f"add_rms_norm.*({OFF})"),
    _ops("WrongDtype", "silu_and_mul", "dtype torch.float32, not torch.bfloat16", dtype="bfloat16"),
    _ops("GateSwapped", "silu_and_mul", f"silu_and_mul.*({OFF})"),
    _ops("InputOverwritten", "silu_and_mul", "changed one of its inputs"),
    _ops("ViewsIgnored", "silu_and_mul", f"view=True.*({OFF})"),
    _ops("NoRowsCrash", "silu_and_mul", "a grid of 0 programs"),
    _ops("ExactGelu", "gelu_tanh_and_mul", f"gelu.*({OFF})"),
    _ops("RopePairing", "rotary_embedding", f"{OFF}|nat", LOGPROBS.format("gqa")),
    _ops("RopeSign", "rotary_embedding", OFF),
    _ops("RopePositionOff", "rotary_embedding", OFF),
    _ops(
        "RopeNarrow",
        "rotary_embedding",
        f"positions up to 100000.*({OFF})|nat|is \\d+, not",
        "golden/test_larger_models[long-1024]",
    ),
    _ops("RopeClamped", "rotary_embedding", f"positions up to 100000.*({OFF})"),
    _ops(
        "WideWrong",
        "linear",
        f"70001.*({OFF})|nat|is \\d+, not",
        "golden/test_larger_models[wide-40]",
    ),
    _ops(
        "ArgmaxShort",
        "greedy_sample",
        "6x70001|is \\d+, not",
        "golden/test_larger_models[wide-40]",
    ),
    _ops("BiasForgotten", "linear", f"bias=True.*({OFF})"),
    _ops("TailDropped", "linear", OFF),
    _ops("NarrowLogits", "linear", f"wide.*({OFF})", dtype="bfloat16"),
    _ops("GateIgnored", "gated_linear", f"gelu_tanh.*({OFF})"),
    _ops("LastToken", "embedding", OFF),
    _ops("ExpertsUnweighted", "fused_experts", OFF),
    _ops(
        "LastOfTies",
        "greedy_sample",
        "not|assert",
        "sampler/test_greedy_is_the_first_of_the_largest",
    ),
    _ops("TopKOff", "top_k_top_p_sample", "k=1.*not|k=3.*not"),
    _ops("TopPShort", "top_k_top_p_sample", r"p=0\.[67].*not"),
    _ops("MinPIgnored", "top_k_top_p_sample", r"min_p=0\.[12].*not"),
    Mutant(
        "TopKOff in the sampler",
        (f"ops.library._target_={HERE}.ops.TopKOff",),
        ("sampler/test_only_the_allowed_set_is_drawn_and_all_of_it[{'top_k': 4}]",),
        "which may not come",
    ),
    Mutant(
        "SkewedDraws",
        (f"ops.library._target_={HERE}.ops.SkewedDraws",),
        ("sampler/test_draws_follow_the_distribution",),
        "not the distribution",
    ),
)

ATTENTION = (
    _attention("NoMask", OFF, "prefill/test_lengths[float32]"),
    _attention("WindowOff", OFF, "prefill/test_window[7]", "decode/test_window[5]"),
    _attention(
        "WindowIgnored",
        f"{OFF}|nat",
        "prefill/test_window[7]",
        LOGPROBS.format("window"),
    ),
    _attention("SoftCapIgnored", OFF, "prefill/test_soft_cap[None]", "decode/test_soft_cap"),
    _attention("HeadsMixed", OFF, "prefill/test_lengths[float32]"),
    _attention("ScaleWrong", OFF, "prefill/test_lengths[float32]"),
    _attention("DroppedLastKey", OFF, "decode/test_decodes[float32]"),
    _attention("StaleBlock", OFF, "decode/test_decodes[float32]"),
    _attention("FirstTable", OFF, "decode/test_mixed[float32]"),
    _attention("ReadsBeyond", f"{OFF}|nan", "decode/test_decodes[float32]"),
    _attention("SlotOff", "wrong slots changed", "kv/test_attention_writes[float32]"),
    _attention("RoundedValues", "not those given", "kv/test_attention_writes[float32]"),
    _attention("LastTokenUnwritten", "wrong slots changed", "kv/test_attention_writes[float32]"),
)

DEVICE = (
    _slot(
        "device",
        "device.WrongBytes",
        "free fell by",
        "device/test_memory_falls_and_recovers[budget]",
    ),
    _slot(
        "device",
        "device.FreeAboveTotal",
        "DeviceMemory",
        "device/test_memory_falls_and_recovers[whole]",
    ),
    _slot("device", "device.DtypeCast", "DID NOT RAISE", "device/test_dtypes"),
    _slot(
        "device",
        "device.ThreadsKept",
        "number of threads was not restored",
        "lifecycle/test_a_failed_start_is_undone[worker]",
        more=("device.threads=3",),
    ),
    _slot("kv_layout", "device.PadWritten", "differ after a write", "kv/test_writes[64-float32]"),
    _slot("kv_layout", "device.OffsetWrong", "differ after a write", "kv/test_writes[64-float32]"),
    _slot("kv_layout", "device.HalfTheBytes", "the layout says", "kv/test_bytes_per_block"),
    _slot("communicator", "device.SwappedRanks", "rank order", "communicator/test_collectives[2]"),
    _slot("communicator", "device.NoReduce", "no sum", "communicator/test_collectives[2]"),
    _slot(
        "communicator",
        "device.DeathUnnoticed",
        "came to an end",
        "communicator/test_a_dead_peer_is_noticed[2]",
    ),
    Mutant(
        "ClaimsAnOp",
        ("++platform.capabilities.ops=[fused_experts]", "ops.fused_experts=torch"),
        ("manifest/test_it_has_the_ops_that_it_claims",),
        "fused_experts runs on torch",
        ("platform=cpu",),
    ),
    Mutant(
        "ClaimsAKvDtype",
        ("++platform.capabilities.kv_dtypes=[float8_e5m2]",),
        ("manifest/test_every_declared_value_is_run",),
        "no check runs float8_e5m2",
    ),
    Mutant(
        "ClaimsABlockSize",
        ("++platform.capabilities.block_sizes=[2048]",),
        ("kv/test_block_sizes",),
        "block_size",
    ),
    Mutant(
        "ClaimsADtype",
        ("++platform.capabilities.dtypes=[float32,float8_e5m2]",),
        ("device/test_dtypes",),
        "the device lacks float8_e5m2",
    ),
)

SAMPLER = (
    _slot(
        "sampler",
        "sampling.SeedsIgnored",
        "gave other",
        "sampler/test_a_seed_gives_the_same_tokens_again",
    ),
    _slot(
        "sampler",
        "sampling.OneSeed",
        "make no difference",
        "sampler/test_a_seed_gives_the_same_tokens_again",
    ),
    _slot(
        "sampler",
        "sampling.MasksIgnored",
        "masks were not obeyed",
        "masks/test_a_row_obeys_its_own_mask_alone[begun]",
    ),
    _slot(
        "sampler",
        "sampling.MasksOfDraftsLost",
        "assert",
        "masks/test_masks_go_on_with_the_answer_and_its_drafts",
    ),
    _slot("sampler", "sampling.PenaltyLeak", "other tokens", "sampler/test_rows_do_not_leak"),
    _slot("sampler", "sampling.BiasLeak", "other tokens", "sampler/test_rows_do_not_leak"),
    _slot(
        "sampler",
        "sampling.PenaltyOfPrompt",
        "assert",
        "sampler/test_penalties_and_biases[{'frequency_penalty': 1.1}]",
    ),
    _slot(
        "sampler",
        "sampling.NanSwallowed",
        "rows that failed",
        "sampler/test_a_row_of_nan_fails_alone[nan]",
    ),
    _slot(
        "sampler",
        "sampling.NanSpreads",
        "rows that failed",
        "sampler/test_a_row_of_nan_fails_alone[nan]",
    ),
    _slot(
        "sampler",
        "sampling.MinTokensIgnored",
        "assert",
        "sampler/test_ends_stay_away_before_min_tokens",
    ),
    _slot(
        "sampler",
        "sampling.TemperatureSquared",
        "not the distribution",
        "sampler/test_draws_follow_the_distribution",
    ),
    _slot("sampler", "sampling.RankFromZero", "assert", "sampler/test_logprobs"),
    _slot(
        "sampler",
        "sampling.RowsSwapped",
        "assert",
        "sampler/test_greedy_is_the_first_of_the_largest",
    ),
    _slot(
        "sampler",
        "sampling.Untyped",
        r"sampler\.extra",
        "config/test_no_key_takes_just_anything",
        more=("+sampler.extra=1",),
    ),
    _slot("sampler", "sampling.LateError", "late", "soak/test_mixed_load"),
    _slot("sampler", "sampling.Hoards", "resident bytes more", "soak/test_mixed_load"),
)

POOLING = (
    _pooler("last", "pooling.LastButOne", "alone, 2 tokens: off by", "test_vectors[last]"),
    _pooler("mean", "pooling.PadInTheMean", "alone, 2 tokens: off by", "test_vectors[mean]"),
    _pooler("mean", "pooling.LastChunkAlone", "in chunks, 33 tokens: off by", "test_chunks[mean]"),
    _pooler(
        "mean",
        "pooling.MeanOfTheUncached",
        "from the prefix cache, .* tokens: off by",
        "test_prefix_hits[mean]",
    ),
)

ENGINE = (
    _slot("kv_cache_manager", "engine.NoSalt", "salt 'b'", "cache/test_salts_do_not_share"),
    _slot(
        "kv_cache_manager",
        "engine.NoParent",
        "a block twice|off by|another token|is \\d+, not",
        "cache/test_cached_equals_uncached",
    ),
    _slot(
        "kv_cache_manager",
        "engine.KeepsABlock",
        "never came back|schedules none",
        "cache/test_aborts_return_all_blocks",
    ),
    _slot(
        "kv_cache_manager",
        "engine.SharesABlock",
        "writes to blocks",
        "cache/test_preempted_equals_not_preempted",
    ),
    _slot(
        "kv_cache_manager",
        "engine.MatchesTooMuch",
        "off by|is \\d+, not",
        "cache/test_cached_equals_uncached",
    ),
    _slot("kv_cache_manager", "engine.NeverForgets", "assert", "cache/test_a_reset_forgets"),
    _slot(
        "scheduler",
        "engine.AbortKeepsBlocks",
        "never came back|schedules none|writes to blocks",
        "cache/test_aborts_return_all_blocks",
    ),
    _slot(
        "scheduler",
        "engine.PreemptedLosesAToken",
        "after a preemption",
        "cache/test_preempted_equals_not_preempted",
    ),
    _slot(
        "scheduler",
        "engine.ChunkSkipsAToken",
        "in chunks of 13",
        "chunks/test_any_split_of_a_prompt[13]",
    ),
    _slot("program", "engine.RowsOff", "the reference has", GOLDEN),
    _slot(
        "program",
        "engine.BatchDependent",
        "in a batch of 3",
        "batching/test_same_answers_in_any_batch[cached-3]",
    ),
    _slot(
        "program",
        "engine.Noisy",
        "in a batch of 2",
        "batching/test_same_answers_in_any_batch[uncached-2]",
    ),
    _slot("program", "engine.NarrowLogits", "nat", "logprobs/test_logprobs[gqa-float32]"),
    _slot("graph", "engine.StaleGraph", "with graphs", "graphs/test_replay_equals_eager"),
    _slot("graph", "engine.StalePositions", "with graphs", "graphs/test_replay_equals_eager"),
    _slot(
        "model_runner",
        "engine.OwnSampler",
        "override was never called",
        "graph/test_an_override_runs[sampler]",
    ),
    _slot(
        "model_runner",
        "engine.Fragile",
        "the engine ends here",
        "memory/test_out_of_memory_ends_one_step",
    ),
    _slot(
        "executor", "engine.Unclosed", "assert", "lifecycle/test_a_failed_engine_start_is_undone"
    ),
    _slot(
        "loader",
        "engine.MissingIsZero",
        "DID NOT RAISE",
        "weights/test_a_wrong_checkpoint_is_refused[missing]",
    ),
    _slot(
        "loader",
        "engine.SurpriseAccepted",
        "DID NOT RAISE",
        "weights/test_a_wrong_checkpoint_is_refused[unexpected]",
    ),
    _slot(
        "loader",
        "engine.NormForgotten",
        r"do not depend on model\.norm\.weight",
        "weights/test_every_tensor_counts[gqa]",
    ),
)

NOT_GIVEN = "are not those that were given"
HANDOVER = tuple(
    _slot("worker", f"handover.{cls}", reason, *killers, more=("worker=handover",))
    for cls, reason, killers in (
        ("LastBlockOff", NOT_GIVEN, ("handover/test_values[float32-float32-takes]",)),
        (
            "WholeBlocksAlone",
            f"{NOT_GIVEN}|nat|is \\d+, not",
            ("handover/test_values[float32-float32-takes]", "handover/test_tokens[gqa-takes]"),
        ),
        (
            "WritesBeyond",
            "changed keys of other tokens",
            ("handover/test_values[float32-float32-takes]",),
        ),
        ("LayersSwapped", NOT_GIVEN, ("handover/test_values[float32-float32-takes]",)),
        (
            "HeadsSwapped",
            NOT_GIVEN,
            ("handover/test_heads_of_two_ranks[gives]", "handover/test_heads_of_two_ranks[takes]"),
        ),
        ("GroupLost", NOT_GIVEN, ("handover/test_groups[takes]",)),
        ("RoundsTwice", NOT_GIVEN, ("handover/test_values[float16-float32-takes]",)),
    )
)

QUANTIZATION = (
    _slot(
        "quantization",
        "quantization.BiasDropped",
        r"the reference has|nat|do not depend on model\.layers\.0\.self_attn\.q_proj\.bias",
        "golden/test_tokens[bias-float32]",
        LOGPROBS.format("bias"),
        "weights/test_every_tensor_counts[bias]",
    ),
    _own_quantization(
        "signs",
        "cosine|nat on average",
        "weights/test_quantised_products[signs-(96, 130)]",
    ),
    _own_quantization(
        "unchanged", "it changes nothing", "weights/test_quantised_weights[unchanged]"
    ),
)

LEAKS = (
    _slot(
        "attention",
        "leaks.ThreadLeak",
        "threads",
        "lifecycle/test_a_failed_start_is_undone[worker]",
    ),
    _slot(
        "attention", "leaks.FileLeak", "files", "lifecycle/test_a_failed_start_is_undone[worker]"
    ),
    _slot(
        "attention",
        "leaks.SharedMemoryLeak",
        "shared",
        "lifecycle/test_a_failed_start_is_undone[worker]",
    ),
    _slot("attention", "leaks.MemoryLeak", "resident bytes more", "lifecycle/test_fifty_cycles"),
    _slot(
        "attention", "rude_dtype.RudeDtype", "default dtype", "imports/test_imports_change_nothing"
    ),
    _slot(
        "attention",
        "rude_patch.RudePatch",
        r"Device\.synchronize",
        "imports/test_imports_change_nothing",
    ),
)

MUTANTS = (
    *(*OPS, *ATTENTION, *DEVICE, *SAMPLER, *POOLING),
    *(*ENGINE, *HANDOVER, *QUANTIZATION, *LEAKS),
)
