"""Runs the cases of one family of kernels on the device, in this process alone.

    python -m benchmarks.gpu.kernels rms_norm
    python -m benchmarks.gpu.kernels attention-decode-bfloat16

A row for each case: how far it is from the reference, and how far it may be; or why it failed.
An error that spoils the device's context ends the process with status 75, and whoever started it
starts it again behind that case.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import itertools
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention_cases, cases
from benchmarks.gpu.cases import Case, Table
from benchmarks.gpu.compare import worst
from benchmarks.gpu.processes import POISONED, Rows

KINDS = ("edges", "decode", "prefill")
FAMILIES = (
    *cases.LARGE,
    *(
        f"attention-{kind}-{str(dtype).removeprefix('torch.')}"
        for kind, dtype in itertools.product(KINDS, cases.DTYPES)
    ),
)
LONGEST_CASE = 90.0
"""Seconds; a compile of the largest kernel takes a few. A case that hangs ends the process."""
TRACE = 4000
WAITS = (1.0, 4.0, 10.0, 20.0)
"""Seconds before a case that found the device's memory full is tried again: other processes have
theirs for a while."""


def cases_of(family: str) -> Iterator[Case]:
    """Of one of FAMILIES, or what ``module:function`` gives."""
    if ":" in family:
        module, name = family.split(":")
        yield from getattr(importlib.import_module(module), name)()
    elif family.startswith("attention-"):
        _, kind, dtype = family.split("-")
        yield from attention_cases.cases(kind, getattr(torch, dtype))
    else:
        yield from cases.cases(family)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a case failed, 75 when the context is spent."""
    parser = argparse.ArgumentParser(description="cases of one family of kernels")
    parser.add_argument("family", help=f"{', '.join(FAMILIES)}, or module:function")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--stop", type=int, help="number of the case to stop before")
    options = parser.parse_args(arguments)
    faulthandler.enable()  # a crash says where it was
    table, row = Table(options.device), Rows(options.out)
    failed = 0
    listed = itertools.islice(enumerate(cases_of(options.family)), options.start, options.stop)
    for number, case in listed:
        row(begin=number, name=case.label)
        faulthandler.dump_traceback_later(LONGEST_CASE, exit=True)
        begin = time.perf_counter()
        spent = False
        try:
            found = judged(case, table)
            synchronize(table.device)
        except Exception as error:  # compilers and drivers raise what they like
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:TRACE]}
            found["trace"] = traceback.format_exc()[-TRACE:]
            spent = is_spent(table.device)
        faulthandler.cancel_dump_traceback_later()
        failed += not found["passed"]
        seconds = round(time.perf_counter() - begin, 3)
        row(kernel=options.family, name=case.label, seconds=seconds, **found)
        if spent:
            return POISONED
    return int(bool(failed))


def judged(case: Case, table: Table) -> dict[str, Any]:
    """The row of one case. Its memory goes back to the device, which many processes share."""
    for waited, seconds in enumerate((*WAITS, None)):
        try:
            with torch.inference_mode():
                found = worst(case.judge(table)).row()
            return found | ({"waited_for_memory": waited} if waited else {})
        except torch.OutOfMemoryError:
            if seconds is None:
                raise
        finally:
            release(table.device)
        time.sleep(seconds)
    raise AssertionError


def release(device: torch.device) -> None:
    """Hand back what torch only caches."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def is_spent(device: torch.device) -> bool:
    """Whether nothing more can run in this process: an illegal access stays with the context."""
    try:
        synchronize(device)
        torch.ones(1, device=device).add_(1).cpu()
    except Exception:  # whatever it is, it is not the next case's fault
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
