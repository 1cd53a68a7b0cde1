"""``vllm-di chat``: talk to the model in the terminal."""

from __future__ import annotations

import sys

from vllm_di.commands.arguments import Arguments, no_words
from vllm_di.commands.complete import sampling
from vllm_di.commands.say import say
from vllm_di.errors import RequestError


def run(arguments: Arguments) -> int:
    """One line, one turn. ``/quit`` or end of input ends, ``/new`` forgets what was said."""
    no_words(arguments)
    params = sampling(arguments)
    start = [{"role": "system", "content": s}] if (s := arguments.options.get("--system")) else []
    from vllm_di.llm import LLM

    with LLM(overrides=arguments.overrides, config_dirs=arguments.config_dirs) as llm:
        say(llm.assembly.announcement)
        messages = list(start)
        while (line := _ask()) is not None:
            if line == "/new":
                messages = list(start)
            elif line:
                messages.append({"role": "user", "content": line})
                answer = ""
                try:
                    prompt = llm.chat_template.render(messages)
                    for text in llm.stream(prompt, params, add_special_tokens=False):
                        print(text, end="", flush=True)
                        answer += text
                except RequestError as error:
                    say(f"{error}; /new starts afresh")
                    messages.pop()
                    continue
                print()
                messages.append({"role": "assistant", "content": answer})
    return 0


def _ask() -> str | None:
    """The next line; None at the end. The prompt is shown to people alone."""
    if sys.stdin.isatty():
        try:
            line = input("> ").strip()
        except EOFError:
            return None
    else:
        text = sys.stdin.readline()
        if not text:
            return None
        line = text.strip()
    return None if line == "/quit" else line
