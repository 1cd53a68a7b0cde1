"""What an assembly takes from the checkpoint: the model's shape, its format, its defaults."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, open_dict

from vllm_di.containers.compose import Composition, ConfigTree
from vllm_di.containers.nested import replace_option
from vllm_di.containers.origins import Origin, place_of
from vllm_di.containers.registered import KEY as ARCHITECTURES
from vllm_di.errors import CheckpointError, ConfigError, nearest

GIVE_WEIGHTS = (
    "give them with model.path=FOLDER, FILE.gguf or a hub name (org/name), or run with random "
    "weights: loader=dummy"
)
MISSING = "missing: model.path; set it to FOLDER, FILE.gguf or a hub name, or take loader=dummy"
"""Placeholder in an incomplete assembly for a value of the checkpoint."""
STAND_INS = {"tokenizer": "bytes", "chat_template": "plain"}
"""Options for a model without a checkpoint, unless the user chose others."""

SHIPPED_MODEL = "vllm_di.models.decoder.Decoder"
"""The only class that transformers' code may replace."""
ENCODER_MODEL = "vllm_di.models.encoder.Encoder"
TRANSFORMERS_MODEL = "vllm_di.models.transformers_fallback.TransformersModel"


def resolve_checkpoint(tree: ConfigTree, composition: Composition, incomplete: bool) -> None:
    """Fill ``checkpoint``, and the keys of ``model`` that the YAML leaves to the checkpoint."""
    # imported here: `vllm-di --help` composes without a checkpoint
    from vllm_di.models.checkpoint import describe
    from vllm_di.models.generation_config import sampling_defaults
    from vllm_di.models.hf_config import read_fields

    values = composition.values
    model, checkpoint = values.model, values.checkpoint
    option, chosen = composition.choices["model"]
    loader = composition.choices["loader"][0]
    registered = _pop_architectures(composition)
    takes_sampling = _takes_sampling(composition)
    config: dict[str, Any] = {}
    if values.model_name is None:
        found_by_path = option == "local" or chosen.chosen_by == "checkpoint"
        named = not found_by_path or model.get("path") is None
        values.model_name = option if named else Path(str(model.path)).stem
    if model.get("path") is None:
        if loader != "auto":
            for slot, option in STAND_INS.items():
                if not _is_chosen(composition, slot):
                    replace_option(tree, composition, slot, option, "no checkpoint brings its own")
        elif incomplete:
            _note_missing(composition)
        else:
            raise ConfigError(f"{chosen}: model={option} brings no weights; {GIVE_WEIGHTS}")
    else:
        description = describe(str(model.path))
        checkpoint.format, checkpoint.weights = description.format, description.weights
        checkpoint.tokenizer = description.tokenizer
        if takes_sampling:
            place = f"{model.path}: generation_config.json"
            sampling, left_out = sampling_defaults(description.generation_config, place)
            checkpoint.sampling, checkpoint.left_out = sampling, left_out
        own = [str(key) for key in model] if _is_own_class(composition) else None
        native = model.get("implementation") != "transformers"
        config, generation = description.hf_config, description.generation_config
        try:
            fields = read_fields(config, generation, own=own, native=native)
        except CheckpointError as error:
            raise type(error)(f"{model.path}: {error}") from error
        if registered and fields["architecture"] not in registered:
            raise ConfigError(
                f"{chosen}: model={option} is for {', '.join(registered)}, but the checkpoint "
                f"{model.path} is a {fields['architecture']}; take model=local"
            )
        for key, value in fields.items():
            _take(composition, key, value)
        if loader == "auto":
            replace_option(
                tree,
                composition,
                "loader",
                description.format,
                f"{Path(description.weights).name} is {description.format}",
            )
    _choose_parsers(tree, composition)
    _choose_pooler(tree, composition, config)
    _take_encoder(tree, composition)
    _fall_back(composition)
    _keep_quantized(tree, composition, config)


def _choose_parsers(tree: ConfigTree, composition: Composition) -> None:
    """Take the parsers that go with the chat template, where ``auto`` is chosen."""
    from vllm_di.components.chat_template.sources import templates_of
    from vllm_di.components.reasoning_parser import families as reasoning
    from vllm_di.components.tool_parser import families as tools

    choosers = {"tool_parser": tools.family_of, "reasoning_parser": reasoning.family_of}
    wanted = [slot for slot in choosers if composition.choices[slot][0] == "auto"]
    if not wanted:
        return
    node, place = composition.values.chat_template, ""
    template, folder = node.get("template"), node.get("tokenizer_path")
    templates: dict[str, str] = {}
    if template or (folder and folder != MISSING):
        templates, place = templates_of(folder, template)
    for slot in wanted:
        option, why = choosers[slot]("\n".join(templates.values()))
        why = f"{place or 'no chat template'}: {why}"
        replace_option(tree, composition, slot, option, why)


def _choose_pooler(tree: ConfigTree, composition: Composition, config: dict[str, Any]) -> None:
    """Pool as the checkpoint says, where ``auto`` is chosen; take what it says of vectors, where
    nobody set it."""
    from vllm_di.models.pooling_config import PoolingChoice, pooling_of

    values, option = composition.values, composition.choices["pooler"][0]
    if option == "none":
        return
    said = PoolingChoice("none", "no checkpoint says how to pool")
    if config:
        chosen = None if option == "auto" else option
        said = pooling_of(str(values.checkpoint.weights), config, chosen)
    if option == "auto":
        replace_option(tree, composition, "pooler", option := said.option, said.why)
    if option == "none" or said.option == "none":
        return
    told: dict[str, Any] = {"normalize": said.normalize, "dimensions": said.dimensions}
    if said.activation is not None:
        told["activation"] = said.activation
    for key, value in told.items():
        origin = composition.origins.get(f"pooler.{key}")
        if key in values.pooler and not (origin is not None and origin.by_user):
            OmegaConf.update(values, f"pooler.{key}", value, force_add=True)
            composition.origins[f"pooler.{key}"] = Origin("checkpoint", text=str(values.model.path))
    if said.max_tokens is not None and values.model.get("max_model_len") is None:
        _take(composition, "max_model_len", said.max_tokens)


def _keep_quantized(tree: ConfigTree, composition: Composition, config: dict[str, Any]) -> None:
    """Take ``quantization=checkpoint`` for quantised safetensors, where the platform declares it
    and nobody chose another."""
    from vllm_di.components.loader.scheme import read_scheme

    values, option = composition.values, "checkpoint"
    declared = OmegaConf.select(values, "platform.capabilities.quantization")
    keeps = OmegaConf.is_list(declared) and option in declared
    foreign = values.model.get("_target_") == TRANSFORMERS_MODEL
    if not keeps or foreign or _is_chosen(composition, "quantization"):
        return
    scheme = read_scheme(config)
    if composition.choices["loader"][0] == "safetensors" and scheme and not scheme.is_float:
        replace_option(tree, composition, "quantization", option, f"config.json: {scheme}")


def _note_missing(composition: Composition) -> None:
    """Put what is missing in place of each value of the checkpoint."""
    values, missing = composition.values, composition.missing
    values.checkpoint.weights = values.checkpoint.tokenizer = MISSING
    values.loader._target_ = missing["loader"] = MISSING
    if not values.model.get("architecture"):
        missing["model"] = MISSING  # every key of its would come from there


def left_out(values: dict[str, Any]) -> list[str]:
    place = f"{values['model'].get('path')}: generation_config.json"
    names = values["checkpoint"]["left_out"]
    return [f"{place}: {name} is not supported, and left out" for name in names]


def _takes_sampling(composition: Composition) -> bool:
    choice = composition.values.generation_config
    if choice not in ("checkpoint", "none"):
        raise ConfigError(
            f"{place_of(composition.origins, 'generation_config')}: generation_config: expected "
            f"checkpoint or none, got {choice!r}{nearest(str(choice), ['checkpoint', 'none'])}"
        )
    return bool(choice == "checkpoint")


def _pop_architectures(composition: Composition) -> list[str]:
    """The architectures that a model option registers; the key is not an argument of its class."""
    model = composition.values.model
    with open_dict(model):
        names = model.pop(ARCHITECTURES, None)
    origin = composition.origins.pop(f"model.{ARCHITECTURES}", "config")
    names = OmegaConf.to_container(names) if OmegaConf.is_config(names) else names
    if names is not None and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        raise ConfigError(
            f"{origin}: model.{ARCHITECTURES}: expected a list of class names, got {names!r}"
        )
    return names or []


def _is_own_class(composition: Composition) -> bool:
    """Whether the model's class is not ours."""
    return composition.values.model.get("_target_") not in (
        SHIPPED_MODEL,
        ENCODER_MODEL,
        TRANSFORMERS_MODEL,
    )


def _take_encoder(tree: ConfigTree, composition: Composition) -> None:
    """Replace the shipped decoder by the encoder, where the checkpoint is one; and an attention
    that cannot look both ways by one that can, unless the user chose it."""
    from vllm_di.models.encoder_config import ENCODERS

    model, origins = composition.values.model, composition.origins
    architecture = model.get("architecture")
    if architecture not in ENCODERS or model.get("_target_") != SHIPPED_MODEL:
        return
    if model.get("implementation") == "transformers":
        raise ConfigError(
            f"{place_of(origins, 'model.implementation')}: model.implementation=transformers: "
            f"{architecture} is an encoder, and transformers' code runs causal models alone; leave "
            "it out"
        )
    model._target_ = ENCODER_MODEL
    origins["model._target_"] = Origin("checkpoint", text=f"{architecture} is an encoder")
    option, origin = composition.choices["attention"]
    if option != "sdpa" and not origin.by_user:
        why = f"config.json: {architecture} looks both ways, and attention={option} does not"
        replace_option(tree, composition, "attention", "sdpa", why)


def _fall_back(composition: Composition) -> None:
    """Replace the shipped decoder by transformers' code, where ours lacks the architecture or the
    user asks for it. A class that the user named stays."""
    from vllm_di.models.hf_config import is_native

    model, origins = composition.values.model, composition.origins
    wanted, architecture = model.get("implementation"), model.get("architecture")
    origin = origins.get("model._target_")
    typed = origin is not None and origin.by_user
    if model.get("_target_") == ENCODER_MODEL:
        return
    if typed or _is_own_class(composition):
        if wanted == "transformers" and model.get("_target_") != TRANSFORMERS_MODEL:
            place = place_of(origins, "model.implementation")
            raise ConfigError(
                f"{place}: model.implementation=transformers asks for transformers' code, but "
                f"{origin}: model._target_ is {model.get('_target_')}; leave one of them out"
            )
        return
    if wanted == "transformers":
        why = "implementation"
    elif wanted == "auto" and architecture and not is_native(architecture):
        why = f"{architecture} has no native model"
    else:
        return
    model._target_ = TRANSFORMERS_MODEL
    origins["model._target_"] = Origin("checkpoint", text=why)


def _is_chosen(composition: Composition, slot: str) -> bool:
    """Whether the user chose the slot's option, or set one of its keys on the command line."""
    if composition.choices[slot][1].chosen_by != "default":
        return True
    return any(
        key.startswith(f"{slot}.") and origin.by_user for key, origin in composition.origins.items()
    )


def _take(composition: Composition, key: str, value: Any) -> None:
    """Set one field from the checkpoint. Precedence: command line, then YAML (which must equal the
    checkpoint), then checkpoint."""
    _refuse_odd(composition, key, value)
    model, name = composition.values.model, f"model.{key}"
    if value is None or (key not in model and _is_own_class(composition)):
        return  # a class of somebody's own gets the keys that its node names
    if model.get(key) is None:
        OmegaConf.update(composition.values, name, value, force_add=True)
        composition.origins[name] = Origin("checkpoint", text=str(model.path))
        return
    ours = model[key]
    ours = OmegaConf.to_container(ours) if OmegaConf.is_config(ours) else ours
    origin = composition.origins.get(name)
    if ours != value and (origin is None or not origin.by_user):
        raise ConfigError(
            f"{origin or name}: model.{key} is {ours!r}, but the checkpoint {model.path} "
            f"has {value!r}; "
            f"use model=local for a checkpoint of another shape, or say which one holds: "
            f"model.{key}={value}"
        )


DEEPEST = 8
"""Nesting depth of lists and mappings in a checkpoint's config; published configs have three."""


def _refuse_odd(composition: Composition, key: str, value: Any, depth: int = 0) -> None:
    """Architecture values must be finite, and texts of a checkpoint must not interpolate our config
    (``${...}``). Raises CheckpointError."""
    if isinstance(value, Mapping | list) and depth < DEEPEST:
        for inner in value.values() if isinstance(value, Mapping) else value:
            _refuse_odd(composition, key, inner, depth + 1)
        return
    finite = not isinstance(value, float) or math.isfinite(value)
    if depth == DEEPEST or not finite or (isinstance(value, str) and "${" in value):
        raise CheckpointError(
            f"{composition.values.model.path}: config.json gives {key} the value "
            f"{reprlib.repr(value)}, which no model has"
        )
