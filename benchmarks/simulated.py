"""``vllm-di simulate`` beside the real engine, on the same requests: how far is it off?

    python -m benchmarks.simulated [--clock wall|processor] [--steps FILE] [--requests 64]
                                   [--replicas 1,2] [--repeats 2] [overrides]

Steps are measured first, unless ``--steps`` has them. ``wall``: engines in processes of their own,
behind the router, driven in real time: for a quiet machine. ``processor``: the same engines in this
process, one step at a time, each replica's time being the processor time of its own steps: what
others compute meanwhile counts little, and transport and the wait for a processor not at all.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.burst import option
from vllm_di.commands.engines import start_engine
from vllm_di.commands.table import print_table
from vllm_di.components.device.system import cpu_name
from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.slots import EngineContainer, ServerContainer
from vllm_di.server.replicas import ReplicatedEngineClient
from vllm_di.simulation.executors import Clock
from vllm_di.simulation.figures import quantiles
from vllm_di.simulation.fleet import Fleet, Replica, open_fleet
from vllm_di.simulation.loop import Outcome, Simulation
from vllm_di.simulation.matching import File
from vllm_di.simulation.measure import CLOCKS, measure
from vllm_di.simulation.step_times import StepTimes
from vllm_di.simulation.workload import Asked, Lengths, Workload, requests

GIVEN = ["device.threads=1"]
SHARES = (50, 90)


def workloads(count: int, replicas: int) -> list[Workload]:
    """Some requests at a time, and requests at a rate that keeps the machine half busy."""
    lengths: dict[str, Any] = {
        "input": Lengths("lognormal", 120, 0.6),
        "output": Lengths("uniform", 16, 48),
    }
    return [
        Workload(requests=count, rate=None, concurrency=8 * replicas, seed=11, **lengths),
        Workload(
            requests=count,
            rate=1.6 * replicas,
            concurrency=1,
            prefixes=4,
            prefix_len=64,
            prefix_share=0.5,
            seed=12,
            **lengths,
        ),
    ]


def main() -> None:
    words = sys.argv[1:]
    kind = option(words, "--clock", "wall")
    count = int(option(words, "--requests", "64"))
    repeats = int(option(words, "--repeats", "2"))
    known = option(words, "--steps", "")
    numbers = [int(n) for n in option(words, "--replicas", "1,2").split(",")]
    overrides = [*GIVEN, *words]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{cpu_name()}, {cores} cores, load {load:.1f}; times by the {kind} clock", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(known or f"{folder}/steps.json")
        if not known:
            measure(assemble(overrides), repeats=repeats, clock=kind).write(path)
        file = File(path, StepTimes.read(path))
    error = file.times.error()
    if error is not None:
        off = f"{error.median:.1%} (median), {error.total:+.1%} (sum)"
        print(f"the fit: {len(file.times.steps)} steps; off by {off}")
    for number in numbers:
        assembly = assemble([*overrides, f"executor.data_parallel_size={number}"])
        for workload in workloads(count, number):
            print(f"\n{number} replicas: {workload}", flush=True)
            if kind == "wall":
                real = asyncio.run(served(assembly, workload))
            else:
                real = stepped(assembly, workload)
            with ExitStack() as stack:
                told = Simulation(open_fleet(assembly, [file], None, stack), workload).run()
            compare(real, told)
    print(f"\nload at the end: {os.getloadavg()[0]:.1f}")


def compare(real: Outcome, told: Outcome) -> None:
    rows = []
    ours, theirs = rates(told), rates(real)
    for name, value in theirs.items():
        off = ours[name] / value - 1 if value else 0.0
        rows.append([name, f"{value:.4g}", f"{ours[name]:.4g}", f"{100 * off:+.1f}"])
    print_table(["figure", "real", "simulated", "off, %"], rows)


def rates(found: Outcome) -> dict[str, float]:
    named = {"generated tokens/s": found.generated_tokens / found.seconds}
    named |= quantiles("first token", found.first, SHARES)
    named |= quantiles("between tokens", found.between, SHARES)
    named["between tokens, mean, ms"] = 1e3 * sum(found.between) / len(found.between)
    return named | quantiles("whole", found.whole, SHARES)


# processor time


class Stepped:
    """A real engine whose clock is the processor time of its steps."""

    def __init__(self, engine: Any, clock: Clock) -> None:
        engine.clock = CLOCKS["processor"]  # what the scheduler is told of its steps
        self._engine, self._clock = engine, clock
        self.busy = 0.0
        self.add, self.has_work = engine.add, engine.has_work

    def forget(self) -> None:
        """What was there before the run that counts: shapes of steps stay known."""
        self._engine.reset_prefix_cache()
        self._clock.now = self.busy = 0.0

    def step(self) -> Any:
        begin = CLOCKS["processor"]()
        outputs = self._engine.step()
        seconds = CLOCKS["processor"]() - begin
        self.busy += seconds
        self._clock.now += seconds
        return outputs


def stepped(assembly: Assembly, workload: Workload) -> Outcome:
    with ExitStack() as stack:
        replicas: list[Any] = []
        report = None
        for number in range(assembly.num_replicas):
            own = assembly.of_replica(number)
            container = stack.enter_context(opened(EngineContainer, own, launcher=Launcher(own)))
            clock = Clock()
            engine = Stepped(container.engine(), clock)
            report = container.engine().report
            replicas.append(Replica(number, engine, engine, clock))  # type: ignore[arg-type]
        router = stack.enter_context(opened(ServerContainer, assembly, only=["router"])).router()
        assert report is not None
        fleet = Fleet(replicas, router, report, [], [], len(replicas))
        Simulation(fleet, replace(workload, seed=workload.seed + 100)).run()
        for replica in replicas:
            replica.engine.forget()
        return Simulation(fleet, workload).run()


# real time


async def served(assembly: Assembly, workload: Workload) -> Outcome:
    """Engine processes as a server starts them, without HTTP and text."""
    client = await start_engine(assembly)
    found = Outcome()
    with ExitStack() as stack:
        try:
            if isinstance(client, ReplicatedEngineClient):
                container = stack.enter_context(opened(ServerContainer, assembly, only=["router"]))
                client.router = container.router()
            await client.wait_ready()
            report = client.report
            assert report is not None
            for warm in (True, False):  # shapes of steps are known then
                chosen = replace(workload, seed=workload.seed + 100) if warm else workload
                found = Outcome()
                context = report.max_model_len
                await drive(client, chosen, report.vocab_size, context, found, str(warm))
        finally:
            await client.close()
    return found


async def drive(
    client: Any, workload: Workload, vocab: int, context: int, found: Outcome, name: str
) -> None:
    coming = requests(workload, vocab, context)
    begin = time.perf_counter()

    async def one(asked: Asked) -> None:
        params = SamplingParams(temperature=0, max_tokens=asked.output, ignore_eos=True)
        request = EngineRequest(
            request_id=f"{name}-{asked.number}", prompt_token_ids=asked.prompt, params=params
        )
        arrival, last = time.perf_counter(), -1.0
        async with aclosing(client.generate(request)) as outputs:
            async for output in outputs:
                if output.error:
                    raise RuntimeError(output.error)
                now = time.perf_counter()
                if last < 0:
                    found.first.append(now - arrival)
                else:
                    found.between.append(now - last)
                last = now
                found.generated_tokens += len(output.token_ids)
        found.whole.append(last - arrival)
        found.seconds = max(found.seconds, last - begin)

    async def worker() -> None:
        for asked in coming:
            await one(asked)

    if workload.rate is None:
        await asyncio.gather(*(worker() for _ in range(workload.concurrency)))
        return
    tasks, at = [], begin
    for asked in coming:
        at += asked.gap
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(asked)))
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    main()
