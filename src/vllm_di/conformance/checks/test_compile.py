"""Kernels, or the whole step, compile for the hardware that the platform names, without it.

Bars are those of the target: shared memory, registers, code, and nothing spilled.
"""

from __future__ import annotations

from typing import Any

from vllm_di.conformance.compiling import COMPILED, compiler_class
from vllm_di.conformance.outcomes import NotDeclared, NotRun, Record
from vllm_di.conformance.subject import Subject
from vllm_di.errors import PortError


def test_kernel(subject: Subject, record: Record, target: str, compiled_part: str) -> None:
    if subject.manifest.compile is None:
        raise NotDeclared("no targets: platform.compile")
    record.feature(COMPILED + target)
    try:
        compiler = compiler_class(subject)(subject.assembly().stages[0])
        made = compiler.compile(compiled_part, target)
    except PortError as error:  # the compiler is what is absent here, and not the device
        raise NotRun(str(error)) from error
    assert made, f"{compiled_part} compiles nothing"
    kernels: dict[str, Any] = {one.name: dict(one.figures) for one in made}
    record.figure(**kernels)
    beyond = [f"{line}; {one.advice}" for one in made for line in one.beyond()]
    assert not beyond, f"{compiled_part} on {target}: " + "; ".join(beyond)
