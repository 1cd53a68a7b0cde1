"""From the ``config.json`` of an encoder to the fields of ``EncoderConfig``. No torch here."""

from __future__ import annotations

from typing import Any

from vllm_di.errors import CheckpointError, UnsupportedModelError
from vllm_di.models.hf_settings import Config, refuse

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
"""Values that transformers' config classes take for a key that is absent; a RobertaConfig's
vocabulary has another size."""
ROBERTA_VOCABULARY = 50265
ENCODERS = {
    "BertModel": False,
    "BertForSequenceClassification": False,
    "RobertaModel": True,
    "RobertaForSequenceClassification": True,
    "XLMRobertaModel": True,
    "XLMRobertaForSequenceClassification": True,
}
"""Architectures that ``models/encoder.py`` runs -> whether positions count from behind the padding
token's id; such families do not tell the two texts of a pair apart."""
CROSS_ENCODERS = {
    "BertForSequenceClassification": ("pooler.dense", "classifier"),
    "RobertaForSequenceClassification": ("classifier.dense", "classifier.out_proj"),
    "XLMRobertaForSequenceClassification": ("classifier.dense", "classifier.out_proj"),
}
"""Those with a head that scores a pair of texts -> the names of its two linear layers, with a tanh
between them. It reads the first token's hidden state."""
MOST_LAYERS = 10_000
"""Of a config that is believed."""
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def encoder_fields(config: Config) -> dict[str, Any]:
    """Raises UnsupportedModelError for a setting that the encoder lacks."""
    name = config["architectures"][0]
    refuse(config, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    values = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    if name in CROSS_ENCODERS:
        _check_labels(config, name)
    if name.startswith("Roberta") and "vocab_size" not in config:
        values["vocab_size"] = ROBERTA_VOCABULARY
    layers = values["num_hidden_layers"]
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise CheckpointError(f"config.json sets num_hidden_layers={str(layers)[:80]}")
    if values["hidden_act"] not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {values['hidden_act']!r} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    first = 0
    if ENCODERS[name]:
        padding = config.get("pad_token_id", 1)
        first = (1 if padding is None else int(padding)) + 1
    values["max_position_embeddings"] -= first
    return {
        **values,
        "architecture": name,
        "hidden_act": ACTIVATIONS[values["hidden_act"]],
        "first_position": first,
        "eos_token_ids": [],
    }


def _check_labels(config: Config, name: str) -> None:
    """Raises UnsupportedModelError for a classifier of several labels."""
    labels = config.get("id2label")
    named = len(labels) if isinstance(labels, dict) else None
    numbers = [n for n in (config.get("num_labels"), named) if n is not None] or [2]
    if wrong := [n for n in numbers if n != 1]:
        raise UnsupportedModelError(
            f"{name} with num_labels={str(wrong[0])[:80]}: a classifier of several labels is not "
            "supported; one with num_labels=1, a cross-encoder that scores pairs of texts, is"
        )
