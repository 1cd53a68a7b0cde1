"""``vllm-di vllm serve M attention=sdpa -- --max-model-len 4096``: vLLM with choices for its slots;
and what ``explain`` and ``conform`` do with ``--engine vllm``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.commands.say import say
from vllm_di.commands.table import print_table
from vllm_di.errors import ConfigError, nearest

VERBS = ("serve", "bench", "run-batch")
"""Of vLLM's, which start an engine."""


def run(arguments: Arguments) -> int:
    """Check the choices, then become vLLM."""
    if not arguments.words or arguments.words[0] not in VERBS:
        word = arguments.words[0] if arguments.words else ""
        raise UsageError(
            f"vllm {word}: choose {', '.join(VERBS)}{nearest(word, VERBS)}; e.g. "
            "vllm-di vllm serve MODEL attention=sdpa -- --max-model-len 4096"
        )
    from vllm_di.vllm.launch import command

    verb, *words = arguments.words
    line = command(verb, [*words, *arguments.overrides], arguments.rest)
    say(f"starting vllm {' '.join(line[3:])}")
    sys.stderr.flush()
    os.execv(line[0], line)


def explain_slots(arguments: Arguments) -> int:
    """Each slot of vLLM: its class, who chose it, and vLLM's hook."""
    from vllm_di.vllm.choices import choose
    from vllm_di.vllm.container import SHUT
    from vllm_di.vllm.explain import explain, options
    from vllm_di.vllm.sources import from_environment

    slot = arguments.options.get("--slot")
    if slot is not None:
        print_table(["option", "what it is"], [list(row) for row in options(slot).items()])
        return 0
    typed = [(text, "command line") for text in arguments.overrides]
    choices = choose([*from_environment(), *typed], arguments.config_dirs)
    told = explain(choices)
    if "--json" in arguments.switches:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(told)).decode() + "\n")
        return 0
    print(f"{told.engine}\n")
    print_table(
        ["slot", "class", "chosen by", "place", "vLLM's hook"],
        [[r.slot, r.target, r.chosen_by, r.place, r.hook] for r in told.rows],
    )
    print("\nno hook of vLLM's:")
    print_table(["slot", "why"], [[name, why] for name, why in SHUT.items()])
    return 0


def conform(arguments: Arguments) -> int:
    """Each adapter inside vLLM, beside stock vLLM; exit status 1 when a case failed."""
    try:
        from vllm_di.vllm.conformance import run as suite
    except ModuleNotFoundError as error:
        raise ConfigError(f"conform --engine vllm needs {error.name}") from None
    only = [name for name in arguments.options.get("--only", "").split(" ") if name]
    platform = next((o for o in arguments.overrides if o.startswith("platform=")), None)
    if [o for o in arguments.overrides if o != platform]:
        raise UsageError("conform --engine vllm takes platform=NAME and no other override")
    report = suite(platform=platform, only=only)
    rows = [[case.name, case.outcome, f"{case.seconds:.0f} s"] for case in report.cases]
    print_table(["case", "outcome", ""], rows)
    for case in report.cases:
        if case.outcome == "fail":
            print(f"\nFAILED {case.name}: {case.why}")
    print(f"\nvLLM {report.vllm}: {sum(c.outcome == 'pass' for c in report.cases)} of {len(rows)}")
    if path := arguments.options.get("--json"):
        report.write(Path(path))
    return 1 if any(case.outcome == "fail" for case in report.cases) else 0
