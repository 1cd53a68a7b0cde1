"""The cases of the compile check: each part that a platform compiles, for each of its targets."""

from __future__ import annotations

from vllm_di.components.compile_check import CompileCheck
from vllm_di.conformance.subject import Subject
from vllm_di.containers.schema import find_class
from vllm_di.errors import ConfigError, VllmDiError, nearest

COMPILED = "compiles for "
"""Prefix of the features of the matrix that only this check proves."""
NOTHING = [("none", "nothing")]


def compile_cases(subject: Subject) -> list[tuple[str, str]]:
    """(target, part); one case of nothing where no target is named or the manifest is wrong."""
    try:
        wanted = subject.manifest.compile
        if wanted is None:
            return NOTHING
        parts = compiler_class(subject).parts()
    except VllmDiError:  # the case itself says so
        return NOTHING
    return [(target, part) for target in wanted.targets for part in parts]


def compiler_class(subject: Subject) -> type[CompileCheck]:
    """Raises ConfigError for a name that is no such class, or a target that it has not."""
    wanted = subject.manifest.compile
    assert wanted is not None
    place = "platform.compile.by"
    found = find_class(wanted.by, subject.assembly().packages, place, "compile")
    if not issubclass(found, CompileCheck):
        raise ConfigError(f"{place}: {wanted.by} is no CompileCheck (components/compile_check.py)")
    known = found.targets()
    for target in wanted.targets:
        if target not in known:
            raise ConfigError(
                f"platform.compile.targets: {target!r}: {wanted.by} compiles for "
                f"{', '.join(known)}{nearest(target, known)}"
            )
    return found
