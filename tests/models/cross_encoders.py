"""Tiny cross-encoders with random weights and tokenizers that join pairs, beside transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.3,
    "num_labels": 1,
}
MARKS = {
    "Bert": ("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
    "Roberta": ("<s>", "<pad>", "</s>", "<unk>"),
    "XLMRoberta": ("<s>", "<pad>", "</s>", "<unk>"),
}
"""The first entries of each vocabulary; ``w0``, ``w1``, ... follow."""
TYPES = {"Bert": ["token_type_ids"], "Roberta": [], "XLMRoberta": []}
"""What transformers' tokenizer gives a model of each family beside ids and mask."""


class CrossEncoder(NamedTuple):
    """A checkpoint in a folder, and transformers' objects for it."""

    model: Any
    tokenizer: Any

    def logit(self, one: str, other: str, **truncation: Any) -> tuple[list[int], Tensor]:
        """(token ids, []) of a pair, by transformers."""
        inputs = self.tokenizer(one, other, return_tensors="pt", **truncation)
        with torch.no_grad():
            return inputs["input_ids"][0].tolist(), self.model(**inputs).logits[0, 0]


def random_model(name: str, config: Any, *, seed: int) -> Any:
    """One of transformers' classes in fp32 with random weights, those of norms and biases too:
    fresh ones are all ones and zeros, and would test nothing."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(kind: str, folder: Path, **changes: Any) -> CrossEncoder:
    """Write a checkpoint of ``kind``: Bert, Roberta or XLMRoberta."""
    pad = MARKS[kind].index("[PAD]" if kind == "Bert" else "<pad>")
    settings = SHAPE | {"pad_token_id": pad} | changes
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = random_model(f"{kind}ForSequenceClassification", config, seed=5)
    model.save_pretrained(folder)
    marks = MARKS[kind]
    words = [*marks, *(f"w{i}" for i in range(290))]
    library = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=marks[3])
    )
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.post_processor = _template(kind)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_input_names=["input_ids", *TYPES[kind], "attention_mask"],
    )
    return CrossEncoder(model, tokenizer)


def _template(kind: str) -> Any:
    if kind == "Roberta":
        return processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    if kind == "Bert":
        single, pair, special = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]")
    else:  # its types are in the file, and the model has none
        single, pair, special = "<s> $A </s>", "<s> $A </s> </s> $B:1 </s>:1", ("<s>", "</s>")
    ids = [(mark, MARKS[kind].index(mark)) for mark in special]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
