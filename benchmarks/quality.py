"""What quantised weights cost in quality: perplexity of a fixed text, and how often the likeliest
next token is the one that bf16 names. ``python -m benchmarks.quality``."""

from __future__ import annotations

import math
from pathlib import Path

from vllm_di import LLM, SamplingParams
from vllm_di.commands.table import print_table

TEXT = Path(__file__).parent / "text.txt"
OPTIONS = ["none", "int8", "int4", "gguf"]
PARAMS = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)


def main() -> None:
    rows, reference = [], None
    for option in OPTIONS:
        perplexity, likeliest = measure([f"quantization={option}"])
        reference = reference or likeliest
        same = sum(a == b for a, b in zip(likeliest, reference, strict=True)) / len(reference)
        rows.append([option, f"{perplexity:.3f}", f"{same:.1%}"])
    print_table(["quantization", "perplexity", "likeliest token as in bf16"], rows)


def measure(overrides: list[str]) -> tuple[float, list[int]]:
    """-> perplexity, and the likeliest token at each place of the text."""
    with LLM(overrides=["platform=cpu", *overrides]) as llm:
        [output] = llm.generate([TEXT.read_text(encoding="utf-8")], PARAMS)
    assert output.prompt_logprobs is not None
    places = [place for place in output.prompt_logprobs if place is not None]
    own = output.prompt_token_ids[1:]
    total = sum(place[token].logprob for place, token in zip(places, own, strict=True))
    likeliest = [min(place, key=lambda token: place[token].rank) for place in places]
    return math.exp(-total / len(places)), likeliest


if __name__ == "__main__":
    main()
