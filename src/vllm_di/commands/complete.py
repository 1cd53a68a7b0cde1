"""``vllm-di complete "PROMPT"``: continue a text, and print it as it comes."""

from __future__ import annotations

import sys

from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.components.messages import SamplingParams


def run(arguments: Arguments) -> int:
    """The prompt is the plain words, or standard input."""
    prompt = " ".join(arguments.words) or ("" if sys.stdin.isatty() else sys.stdin.read())
    if not prompt:
        raise UsageError('no prompt: vllm-di complete "Once upon a time"')
    params = sampling(arguments)
    from vllm_di.llm import LLM

    with LLM(overrides=arguments.overrides, config_dirs=arguments.config_dirs) as llm:
        for text in llm.stream(prompt, params):
            print(text, end="", flush=True)
    print()
    return 0


def sampling(arguments: Arguments) -> SamplingParams:
    """From --temperature and --max-tokens."""
    limit = arguments.options.get("--max-tokens")
    return SamplingParams(
        temperature=arguments.real("--temperature", 0.0),
        max_tokens=None if limit is None else arguments.number("--max-tokens", 1),
    )
