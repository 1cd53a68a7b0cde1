"""Whose step times an assembly may use: those of a worker that is made of the same parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_di.containers.assembly import Assembly
from vllm_di.errors import ConfigError
from vllm_di.simulation.step_times import StepTimes

FREE = (
    "worker._target_",
    "worker.num_blocks",
    "worker.kv_cache_memory",
    "worker.max_num_seqs",
    "worker.max_num_batched_tokens",
    "model_runner.max_num_seqs",
    "model_runner.max_num_batched_tokens",
    "device.cores",
    "device.memory_budget",
    "loader",
    "model.path",
)
"""Keys of a worker that change no step's time. Every other one must be as it was measured."""


class File(NamedTuple):
    """Step times with their place."""

    path: Path
    times: StepTimes


def find_times(assembly: Assembly, ranks: int, files: Sequence[File]) -> File:
    """For the workers of the assembly's role. Raises ConfigError that says what is otherwise in the
    nearest file."""
    platform, nodes = assembly.platform_of(0).name, assembly.stages[0]
    reasons: list[tuple[int, str]] = []
    for file in files:
        times = file.times
        if times.platform != platform:
            reasons.append((1000, f"{file.path} has those of platform={times.platform}"))
            continue
        if times.ranks != ranks:
            why = f"{file.path} was measured with {times.ranks} ranks, and here are {ranks}"
            reasons.append((999, why))
            continue
        differences = list(_differences(times.worker, nodes))
        if not differences:
            return file
        key, measured, wanted = differences[0]
        place = assembly.place(f"{assembly.prefix(0)}{key}")
        more = f" ({len(differences) - 1} more differ)" if len(differences) > 1 else ""
        reasons.append(
            (
                len(differences),
                f"{file.path} was measured with {key}={_shown(measured)}, and here it is "
                f"{_shown(wanted)} ({place}){more}",
            )
        )
    name = (
        f"{assembly.prefix(0)}platform={platform}" if assembly.prefix(0) else f"platform={platform}"
    )
    raise ConfigError(
        f"--steps: no step times of {name}: {min(reasons)[1]}; measure them: "
        f"vllm-di simulate measure platform={platform} ... -o FILE"
    )


def _differences(
    measured: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    one, other = dict(_flat("", measured)), dict(_flat("", wanted))
    for key in sorted(one.keys() | other.keys()):
        is_free = any(key == free or key.startswith(f"{free}.") for free in FREE)
        if not is_free and one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def _flat(before: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings; lists are values."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{before}.{key}" if before else str(key), inner)
    else:
        yield before, list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
