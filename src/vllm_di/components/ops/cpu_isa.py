"""Which instruction set the C++ kernels of this process are compiled for."""

from __future__ import annotations

from pathlib import Path

from vllm_di.errors import ConfigError
from vllm_di.kernels import isa as sets
from vllm_di.kernels.build import prebuilt as find_prebuilt


def select_isa(name: str, prebuilt: Path | None) -> sets.Choice:
    """``name``, or the best for ``auto``. Raises ConfigError for one that cannot be used here."""
    # a library that was compiled elsewhere asks nothing of the compiler here
    asks_compiler = prebuilt is None or find_prebuilt(sets.AMX, prebuilt) is None
    if name == sets.AUTO:
        return sets.choose_isa(needs_compiler=asks_compiler)
    if name == sets.EMULATED:
        return sets.Choice(name, {})
    usable, machine = sets.usable_isas(), sets.machine()
    if name not in sets.isas_of(machine):
        owner = next(a for a, names in sets.ARCHITECTURES.items() if name in names)
        raise ConfigError(
            f"isa={name} is of {owner}, and this machine is {machine}; it has {', '.join(usable)}"
        )
    if name not in usable:
        raise ConfigError(f"isa={name}: this CPU does not have it; it has {', '.join(usable)}")
    if why := sets.hindrance(name, needs_compiler=asks_compiler):
        raise ConfigError(f"isa={name}: {why}; isa=auto takes the best that works")
    return sets.Choice(name, {})
