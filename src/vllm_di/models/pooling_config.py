"""How a checkpoint's hidden states become one vector, as its files say: sentence-transformers'
``modules.json`` and what it names, else the architecture. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.encoder_config import CROSS_ENCODERS, ENCODERS
from vllm_di.models.hf_config import HEADLESS

MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
"""Keys of a ``Pooling`` module's config, to options of the group ``pooler``."""
NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""Values of ``pooling_mode`` in newer configs, to the same."""
SCORES = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
}
"""What sentence-transformers names as a cross-encoder's activation, to ``pooler.activation``. With
one label it is a sigmoid where nothing is named, as in vLLM."""
Config = Mapping[str, Any]


class PoolingChoice(NamedTuple):
    """An option of the group ``pooler``."""

    option: str
    why: str
    normalize: bool = True
    dimensions: list[int] | None = None
    activation: str | None = None
    """Of a cross-encoder."""
    max_tokens: int | None = None
    """Longest text that the model was made for, where it is shorter than its positions."""


def pooling_of(folder: str, config: Config, chosen: str | None = None) -> PoolingChoice:
    """Raises UnsupportedModelError for modules that are not known, CheckpointError for files that
    cannot be read. ``folder`` may be a GGUF file, which brings no such files. ``chosen``: the
    option that a user took instead; what else the files say holds for it."""
    place = Path(folder)
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    dimensions = _dimensions(config)
    if architecture in CROSS_ENCODERS:
        activation, where = _activation(place, config)
        why = f"config.json: {architecture} is a cross-encoder; {activation}, as {where}"
        return PoolingChoice("score", why, activation=activation)
    if (place / "modules.json").is_file():
        return _of_modules(place, chosen)._replace(dimensions=dimensions)
    if architecture in HEADLESS:
        why = f"config.json: {architecture} has no head, and its last token has seen the text"
        return PoolingChoice("last", why, dimensions=dimensions)
    if architecture in ENCODERS:
        why = f"config.json: {architecture} is an encoder, and no modules.json says how to pool"
        return PoolingChoice("cls", why, dimensions=dimensions)
    return PoolingChoice("none", f"config.json: {architecture or 'no architecture'} generates")


def _activation(folder: Path, config: Config) -> tuple[str, str]:
    """(``pooler.activation``, who says so). Raises UnsupportedModelError for one that is not
    known."""
    file = folder / "config_sentence_transformers.json"
    beside = _read(file, dict) if file.is_file() else {}
    inner = config.get("sentence_transformers")
    places = {
        "config.json: sentence_transformers.activation_fn": (
            inner.get("activation_fn") if isinstance(inner, Mapping) else None
        ),
        "config.json: sbert_ce_default_activation_function": config.get(
            "sbert_ce_default_activation_function"
        ),
        f"{file.name}: activation_fn": beside.get("activation_fn"),
    }
    for where, name in places.items():
        if name is None:
            continue
        if str(name) not in SCORES:
            raise UnsupportedModelError(
                f"{folder}: {where} is {str(name)[:80]!r}; known are {', '.join(SCORES)}"
            )
        return SCORES[str(name)], f"{where} says"
    return "sigmoid", "nothing is said of another activation"


def _of_modules(folder: Path, chosen: str | None) -> PoolingChoice:
    option, why, normalize, max_tokens = "", "", False, None
    for module in _read(folder / "modules.json", list):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        path = str(module.get("path", ""))
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise CheckpointError(f"{folder}/modules.json: path {path[:80]!r} leads elsewhere")
        if kind == "Transformer":
            max_tokens = _transformer(folder / path)
        elif kind == "Pooling":
            option = _mode(folder / path / "config.json")
            why = f"modules.json: {path or 'Pooling'} says so"
        elif kind == "Normalize":
            normalize = True
        else:
            raise UnsupportedModelError(
                f"{folder}/modules.json names {kind[:80]!r}; known are Transformer, Pooling and "
                "Normalize. pooler=none generates text instead"
            )
    if not option and chosen is not None:
        return PoolingChoice(chosen, "", normalize, max_tokens=max_tokens)
    if not option:
        raise UnsupportedModelError(
            f"{folder}/modules.json has no Pooling; choose one: pooler=mean, cls or last"
        )
    return PoolingChoice(option, why, normalize, max_tokens=max_tokens)


def _mode(file: Path) -> str:
    """Raises UnsupportedModelError for any mode, or several at once, that is not known."""
    config = _read(file, dict)
    if config.get("include_prompt") is False:
        raise UnsupportedModelError(f"{file}: include_prompt=false is not supported")
    named = config.get("pooling_mode")
    if named is not None:
        modes = named if isinstance(named, list) else [named]
        on = {str(mode): NAMES.get(str(mode)) for mode in modes}
    else:
        on = {k: MODES.get(k) for k, v in config.items() if k.startswith("pooling_mode_") and v}
    if len(on) != 1 or None in on.values():
        raise UnsupportedModelError(
            f"{file}: pools by {', '.join(on) or 'nothing'}; known are {', '.join(MODES)}, one of "
            "them"
        )
    (option,) = on.values()
    assert option is not None
    return option


def _transformer(folder: Path) -> int | None:
    """Tokens of the longest text, by ``sentence_bert_config.json``."""
    file = folder / "sentence_bert_config.json"
    if not file.is_file():
        return None
    config = _read(file, dict)
    if config.get("do_lower_case"):
        raise UnsupportedModelError(
            f"{file}: do_lower_case=true is not supported: the tokenizer must do it"
        )
    limit = config.get("max_seq_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise CheckpointError(f"{file}: max_seq_length is {str(limit)[:80]}; expected a number")
    return limit


def _dimensions(config: Config) -> list[int] | None:
    """What a vector may be cut to, as vLLM reads it: ``matryoshka_dimensions``, or any size where
    ``is_matryoshka``."""
    sizes = config.get("matryoshka_dimensions")
    if isinstance(sizes, list) and sizes:
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
            raise CheckpointError(f"config.json: matryoshka_dimensions is {str(sizes)[:80]}")
        return sorted(sizes)
    return [] if config.get("is_matryoshka") is True else None


def _read(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None
    entries = value if isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{file}: expected a JSON {kind.__name__}")
    return value
