"""``vllm-di bench latency|throughput|serve``: measured on random prompts, greedy, at fixed lengths.

With ``-m`` a value with commas is tried one by one, each point in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.commands.table import print_table
from vllm_di.components.messages import SamplingParams
from vllm_di.containers.overrides import read
from vllm_di.errors import VllmDiError

Result = dict[str, list[float]]
"""Figure, with its unit, to one value for each counted run."""
KINDS = ("latency", "throughput", "serve")


def run(arguments: Arguments) -> int:
    """Prints a table; ``--json FILE`` writes the same as data."""
    if len(arguments.words) != 1 or arguments.words[0] not in KINDS:
        raise UsageError(f"write: vllm-di bench {'|'.join(KINDS)} [overrides]")
    if "-m" in arguments.switches:
        return _sweep(arguments)
    result = _measure(arguments.words[0], arguments)
    print_table(["figure", "median", "min", "max"], [[n, *_spread(v)] for n, v in result.items()])
    if path := arguments.options.get("--json"):
        data = {"kind": arguments.words[0], "overrides": arguments.overrides, "runs": result}
        Path(path).write_text(json.dumps(data, indent=2))
    return 0


def _measure(kind: str, arguments: Arguments) -> Result:
    if kind == "serve":
        from vllm_di.commands.bench_serve import measure

        return measure(arguments)
    from vllm_di.llm import LLM

    with LLM(overrides=arguments.overrides, config_dirs=arguments.config_dirs) as llm:
        repeats = arguments.number("--repeats", 3)
        runs = arguments.number("--warmup", 1, least=0) + repeats
        once = _latency if kind == "latency" else _throughput
        rows = [once(llm, arguments, number) for number in range(runs)][-repeats:]
    return {name: [row[name] for row in rows] for name in rows[0]}


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for the same seed. Low ids are left out: they may be special."""
    import random

    draw = random.Random(seed)
    low = min(100, vocab_size // 3)
    return [[draw.randrange(low, vocab_size) for _ in range(length)] for _ in range(count)]


def _latency(llm: Any, arguments: Arguments, number: int) -> dict[str, float]:
    """A fixed batch: the whole, the first token, and each token after it."""
    batch = arguments.number("--batch-size", 1)
    given = arguments.number("--input-len", 128)
    wanted = arguments.number("--output-len", 64)
    batches = [
        prompts(batch, given, llm.engine.report.vocab_size, seed)
        for seed in (2 * number, 2 * number + 1)
    ]
    first = _timed(lambda: llm.generate(batches[0], _fixed(1)))
    whole = _timed(lambda: llm.generate(batches[1], _fixed(wanted)))
    figures = {
        "first token, s": first,
        "prefill, tokens/s": batch * given / first,
        "all tokens, s": whole,
    }
    if wanted > 1:
        step = (whole - first) / (wanted - 1)
        figures |= {"each further token, ms": 1e3 * step, "decode, tokens/s": batch / step}
    return figures


def _throughput(llm: Any, arguments: Arguments, number: int) -> dict[str, float]:
    """All requests at once."""
    count = arguments.number("--num-prompts", 64)
    given = arguments.number("--input-len", 128)
    wanted = arguments.number("--output-len", 64)
    asked = prompts(count, given, llm.engine.report.vocab_size, number)
    seconds = _timed(lambda: llm.generate(asked, _fixed(wanted)))
    return {
        "seconds": seconds,
        "requests/s": count / seconds,
        "generated tokens/s": count * wanted / seconds,
        "all tokens/s": count * (given + wanted) / seconds,
    }


def _fixed(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _spread(values: list[float]) -> list[str]:
    return [_short(f(values)) for f in (statistics.median, min, max)]


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


# ------------------------------------------------------------------------------------------------
# sweeps


def points(overrides: list[str]) -> list[list[str]]:
    """Every combination of the comma lists: ``a=x,y b=1`` -> [[a=x, b=1], [a=y, b=1]]."""
    choices = []
    for override in overrides:
        sign, key, equals, value = read(override)
        quoted = value.startswith(("'", '"', "[", "{"))
        values = value.split(",") if not quoted else [value]
        choices.append([f"{sign}{key}{equals}{one}" for one in values])
    return [list(point) for point in itertools.product(*choices)]


def _sweep(arguments: Arguments) -> int:
    """One process for each point; a point that fails is reported and does not lose the rest."""
    import tempfile

    table: list[list[object]] = []
    names: list[str] = []
    results: list[dict[str, Any]] = []
    reasons: list[str] = []
    for point in points(arguments.overrides):
        label = " ".join(o for o in point if o not in _constant(arguments.overrides))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [sys.executable, "-m", "vllm_di.cli", "bench", *arguments.words, *point]
            command += [w for n, v in arguments.options.items() if n != "--json" for w in (n, v)]
            command += [w for d in arguments.config_dirs for w in ("--config-dir", d)]
            command += ["--json", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not path.is_file():
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                reasons.append(f"{label or 'the point'} failed: {reason}")
                table.append([label or "-", "failed"])
                continue
            result = json.loads(path.read_text())
        results.append(result)
        names = names or list(result["runs"])
        table.append(
            [label or "-", *(_short(statistics.median(v)) for v in result["runs"].values())]
        )
    for row in table:
        row += [""] * (len(names) + 1 - len(row))
    print_table(["point", *(names or ["result"])], table)
    if path_given := arguments.options.get("--json"):
        Path(path_given).write_text(json.dumps(results, indent=2))
    for text in reasons:
        print(text, file=sys.stderr)
    if len(reasons) == len(table):
        raise VllmDiError("every point of the sweep failed")
    return 0


def _constant(overrides: list[str]) -> set[str]:
    """Overrides that are the same in every point."""
    return {o for o in overrides if len(points([o])) == 1}
