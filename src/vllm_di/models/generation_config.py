"""What a checkpoint's ``generation_config.json`` says of sampling: the values of requests that set
none. Names and reading are vLLM's (``--generation-config``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_di.components.messages import SamplingParams
from vllm_di.errors import CheckpointError, RequestError

NAMES: dict[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}
"""Key of the file to the name of a sampling parameter, and its type."""
IRRELEVANT = frozenset(
    [
        "transformers_version",
        "do_sample",  # not read by vLLM either: a temperature of 0 is greedy
        "use_cache",
        "cache_implementation",
        "max_length",  # of prompt and answer; transformers' own default
        "length_penalty",  # of beam search, as is the next
        "early_stopping",
        "renormalize_logits",
    ]
)
HARMLESS: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "typical_p": 1.0}
HARMLESS |= {"num_beam_groups": 1, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0}


def sampling_defaults(
    generation: Mapping[str, Any], place: str
) -> tuple[dict[str, Any], list[str]]:
    """-> (sampling parameter to value, what is set and not supported). Raises CheckpointError,
    which names ``place``, for a value out of its range."""
    found: dict[str, Any] = {}
    for key, (name, kind) in NAMES.items():
        value = generation.get(key)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not is_number or (kind is int and not is_whole):
            what = "a whole number" if kind is int else "a number"
            raise _wrong(place, key, f"expected {what}, got {repr(value)[:60]}")
        try:
            found[name] = kind(value)
            SamplingParams(**{name: found[name]})
        except (RequestError, OverflowError) as error:
            raise _wrong(place, key, str(error)) from None
    unused = [
        f"{key}={value!r}"
        for key, value in generation.items()
        if key not in NAMES
        and key not in IRRELEVANT
        and not key.startswith(("_", "output_", "return_"))
        and not (key.endswith(("_token_id", "_token_ids")) and not key.startswith("forced_"))
        and value not in (None, False, 0, "", [], {}, HARMLESS.get(key))
    ]
    return found, unused


def _wrong(place: str, key: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{place}: {key}: {why}; mend it, or leave its values out with generation_config=none"
    )
