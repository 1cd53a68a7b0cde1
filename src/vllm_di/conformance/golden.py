"""Greedy tokens and log-probs of the tiny models on the reference, never on the port itself.

The reference is plain torch in fp32 on the host, one sequence at a time. ``python -m
vllm_di.conformance.golden`` computes all goldens and prints their hashes; ``goldens.json`` holds
those hashes, so that a change of the reference is seen.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path

import torch

from vllm_di.conformance import tiny
from vllm_di.conformance.driving import Answer, Ask, ask, run
from vllm_di.conformance.subject import REFERENCE, Subject

HASHES = Path(__file__).parent / "goldens.json"
TOP = 20
ROOMY = ("worker.num_blocks=192",)
"""For contexts of more than 2,048 tokens in blocks of 16."""


def prompts(count: int) -> list[list[int]]:
    """``count`` prompts of 1 to 40 tokens; a smaller count gives the first of the same prompts."""
    generator = torch.Generator().manual_seed(41)
    found = []
    for _ in range(count):
        length = int(torch.randint(1, 41, (1,), generator=generator))
        found.append(torch.randint(0, 256, (length,), generator=generator).tolist())
    return found


@cache
def goldens(model: str, head_size: int, count: int, length: int) -> list[Answer]:
    """The reference's answers to ``count`` prompts: ``length`` tokens each, with the log-probs of
    the prompt and of the likeliest tokens."""
    asks = [ask(prompt, length, logprobs=TOP, prompt_logprobs=5) for prompt in prompts(count)]
    return _by_reference(model, head_size, asks)


def teacher_forced(model: str, head_size: int, count: int, length: int) -> list[Ask]:
    """Each golden's prompt and answer together as a prompt, so that nothing depends on what is
    sampled: of each position, the log-probs of the likeliest tokens."""
    answers = goldens(model, head_size, count, length)
    return [
        ask([*prompt, *answer.token_ids], 1, prompt_logprobs=TOP)
        for prompt, answer in zip(prompts(count), answers, strict=True)
    ]


@cache
def scored(model: str, head_size: int, count: int, length: int) -> list[Answer]:
    """The reference's answers to ``teacher_forced``."""
    return _by_reference(model, head_size, teacher_forced(model, head_size, count, length))


def larger_asks(model: str, context: int) -> list[Ask]:
    """Requests to one of ``tiny.LARGER``: a prompt of ``context`` tokens, and shorter ones."""
    generator = torch.Generator().manual_seed(43)
    vocab = int(tiny.hf_config(model, 32)["vocab_size"])
    found = []
    for length in (context, 5, 17):
        prompt = torch.randint(0, vocab, (length,), generator=generator).tolist()
        found.append(ask(prompt, 8, logprobs=TOP, prompt_logprobs=TOP))
    return found


@cache
def larger_goldens(model: str, head_size: int, context: int) -> list[Answer]:
    """The reference's answers to ``larger_asks``."""
    return _by_reference(model, head_size, larger_asks(model, context))


def _by_reference(model: str, head_size: int, asks: list[Ask]) -> list[Answer]:
    subject = Subject(REFERENCE)
    try:
        folder = subject.model_folder(model, head_size=head_size)
        with subject.engine(*ROOMY, model=folder) as engine:
            return run(engine, asks)
    finally:
        subject.close()


def digest(answers: list[Answer]) -> str:
    """SHA-256 of the tokens."""
    return hashlib.sha256(json.dumps([a.token_ids for a in answers]).encode()).hexdigest()


def main() -> None:
    """Write the hashes of all goldens at the usual head size."""
    found = {}
    for model in tiny.MODELS:
        found[model] = digest(goldens(model, 32, 32, 128))
        sys.stdout.write(f"{model}: {found[model]}\n")
    HASHES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
