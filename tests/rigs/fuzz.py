"""``make fuzz``: random bodies and raw bytes against a server on loopback, then growth.

    python -m tests.rigs.fuzz [--seed 1] [--bodies 20000] [--sockets 500] [--skip-growth]

No answer may be a 500, no process may end, and the canary must be answered alike after each batch.
Exit status 1 where that does not hold, or where something costs more than linear time.
"""

from __future__ import annotations

import argparse
import http.client
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.rigs import fuzz_bodies, fuzz_sockets
from tests.rigs.growth import all_cases, measure
from tests.rigs.server import JSON, RigServer

from vllm_di import LLM
from vllm_di.components.interfaces import Tokenizer
from vllm_di.components.tokenizer.bytes import BytesTokenizer

BATCH = 1000
CLIENTS = 4
OVERRIDES = ("model.max_model_len=256", "ops=torch", "server.header_timeout_seconds=5")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--sockets", type=int, default=500)
    parser.add_argument("--skip-growth", action="store_true")
    options = parser.parse_args(argv)
    faults: list[str] = []
    if options.bodies or options.sockets:
        with RigServer(OVERRIDES) as server:
            faults += fuzz_with_bodies(server, options.seed, options.bodies)
            faults += fuzz_with_sockets(server, options.seed, options.sockets)
            faults += _errors_in(server)
    if not options.skip_growth:
        faults += judge_growth()
    for fault in faults[:40]:
        print("FAULT", fault)
    print(f"{len(faults)} faults")
    sys.exit(1 if faults else 0)


def fuzz_with_bodies(server: RigServer, seed: int, count: int) -> list[str]:
    """-> faults, after printing how often each status came."""
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    begin = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            shares = [numbers[i::CLIENTS] for i in range(CLIENTS)]
            for seen, bad in pool.map(lambda share: _post_all(server.port, seed, share), shares):
                statuses += seen
                faults += bad
            if problem := _problem(server):
                return [*faults, f"after body {numbers[-1]}: {problem}"]
    seconds = time.monotonic() - begin
    print(
        f"{count:,} bodies in {seconds:.0f} s: {_shown(statuses)}; canary equal after each {BATCH}"
    )
    return faults


def _post_all(port: int, seed: int, numbers: Sequence[int]) -> tuple[Counter[str], list[str]]:
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for number in numbers:
        path, body = fuzz_bodies.case(random.Random(f"{seed}/{number}"))
        try:
            connection.request("POST", path, body, JSON)
            response = connection.getresponse()
            answer, status = response.read(), response.status
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"body {number}: {path}: {type(error).__name__}: {error}: {body[:200]!r}")
            connection.close()
            continue
        name = str(status)
        if status == 200 and b'"server_error"' in answer:
            name = "200, then server_error"
        if status >= 500 or name != str(status):
            faults.append(f"body {number}: {path}: {name}: {answer[-300:]!r}: {body[:400]!r}")
        statuses[name] += 1
    connection.close()
    return statuses, faults


def fuzz_with_sockets(server: RigServer, seed: int, count: int) -> list[str]:
    """-> faults, after printing how often each kind was answered how."""
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    begin = time.monotonic()
    for number in range(count):
        rng = random.Random(f"{seed}/socket/{number}")
        case = fuzz_sockets.KINDS[number % len(fuzz_sockets.KINDS)](rng)
        try:
            answers = fuzz_sockets.send(server.port, case)
        except OSError as error:
            faults.append(f"socket {number}, {case.name}: {type(error).__name__}: {error}")
            continue
        statuses.update([str(status) for status in answers] or ["closed or silent"])
        sent = f"socket {number}, {case.name}: {case.pieces[0][:200]!r}"
        if any(status == 500 for status in answers):
            faults.append(f"{sent} was answered with {answers}")
        if len([status for status in answers if status != 100]) > case.most:
            faults.append(f"{sent} holds {case.most} requests, but had {len(answers)} answers")
        if number % 50 == 49 and (problem := _problem(server)):
            return [*faults, f"{sent}: {problem}"]
    if problem := _problem(server):
        faults.append(problem)
    seconds = time.monotonic() - begin
    print(f"{count:,} raw cases in {seconds:.0f} s: {_shown(statuses)}; canary equal after each 50")
    return faults


def judge_growth() -> list[str]:
    """CPU time at 4n beside that at n, for all that a request can make long."""
    tokenizers: dict[str, Tokenizer] = {"bytes": BytesTokenizer(vocab_size=320)}
    logging.getLogger("vllm_di").setLevel(logging.ERROR)
    with LLM("tiny", overrides=["tokenizer=bytes", "ops=torch"]) as llm:
        with LLM("smollm2", overrides=["executor=inline"]) as real:
            tokenizers["smollm2"] = real.tokenizer
        found = []
        for case in all_cases(llm, tokenizers):
            found.append(measure(case))
            print(found[-1], flush=True)
    print(f"{len(found)} kinds of long requests, {sum(not g.good for g in found)} more than linear")
    return [str(growth) for growth in found if not growth.good]


def _problem(server: RigServer) -> str | None:
    try:
        server.check()
    except (AssertionError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _errors_in(server: RigServer) -> list[str]:
    """What the server logged as an error of its own."""
    text = server.log.read_text(errors="replace")
    return [f"the log has a traceback: {text[-600:]}"] if "Traceback" in text else []


def _shown(statuses: Counter[str]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(statuses.items()))


if __name__ == "__main__":
    main()
