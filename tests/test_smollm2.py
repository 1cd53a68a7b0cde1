"""The demo's model, token for token as transformers generates it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_di import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969,",
    "List five animals:",
    "To bake bread, you need",
    "The opposite of hot is",
    "E = mc^2 means",
    "Dear Sir or Madam,",
    "import numpy as np\n",
    "The sun rises in",
    "Les trois mousquetaires",
    "1, 2, 3, 4,",
    "She opened the door and",
    "SELECT name FROM",
    "A prime number is",
    "The moon",
    "x",
]
NEW = 64


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_in_fp32() -> None:
    """20 prompts, 64 tokens each, all in one batch here and one by one there."""
    from transformers import AutoModelForCausalLM, GgufConfig

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with LLM(overrides=["platform=cpu", "model.dtype=float32"]) as llm:
        file = Path(llm.assembly.settings["checkpoint"]["weights"])
        ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
        ours = [o.outputs[0].token_ids for o in llm.generate(ids, params)]
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    for prompt, mine in zip(ids, ours, strict=True):
        tokens = torch.tensor([prompt])
        theirs = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            do_sample=False,
        )
        assert mine == theirs[0, len(prompt) :].tolist()
