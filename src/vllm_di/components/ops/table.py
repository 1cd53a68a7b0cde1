"""The op table: for each op, the library that runs it."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Literal

from vllm_di.components.interfaces import OpLibrary, OpTable, Recorder, Reuse
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError, PortError, nearest

Choice = OpLibrary | Literal["auto"]


class SelectedOps(OpTable):
    """Takes each op from the library that the config names for it.

    ``auto`` is the main library where it implements the op, else the torch reference. The chosen
    bound methods become attributes of the instance, so that a call goes straight to the library. A
    fused op that is not in force is the declared one, which calls its members on this table.
    """

    __signature__ = Signature(
        [
            Parameter("library", Parameter.POSITIONAL_OR_KEYWORD, annotation=OpLibrary),
            *(
                Parameter(op, Parameter.KEYWORD_ONLY, default="auto", annotation=Choice)
                for op in OpTable.OPS
            ),
        ]
    )
    """The keys of its node: one for each op that is declared."""

    def __init__(self, library: OpLibrary, **choices: OpLibrary | Literal["auto"]) -> None:
        for name in choices.keys() - self.OPS.keys():
            raise TypeError(f"there is no op {name!r}{nearest(name, self.OPS)}")
        libraries = [library, *(c for c in choices.values() if c != "auto")]
        for each in libraries:
            _check_methods(each)
        self._library = library
        self._reference = next(filter(_is_reference, libraries), None) or TorchOps()
        self._owners: dict[str, OpLibrary | None] = {}
        """Op to the library that runs it; None for a fused op that is taken apart."""
        for op in self.OPS:
            self._owners[op] = self._owner(op, choices.get(op, "auto"))
        chosen = {op for op, choice in choices.items() if choice != "auto"}
        self._passed_over = {
            fused: [op for op in self.OPS[fused].goes_before if op in chosen]
            for fused in self.OPS.fused.keys() - chosen
        }
        """Fused op to those that were chosen in its place."""
        for fused in self.OPS.fused.keys() - chosen:
            if self._apart(fused) or self._passed_over[fused]:
                self._owners[fused] = None
        self.fusions = tuple(op for op in self.OPS.fused if self._owners[op] is not None)
        for op, owner in self._owners.items():
            if owner is not None:
                setattr(self, op, getattr(owner, op))
                if pack := self.OPS[op].pack:
                    setattr(self, pack, getattr(owner, pack))

    def describe(self) -> dict[str, str]:
        """Op to where it runs; where the main library has a reason for not running it, the
        reason."""
        reasons = self._library.describe()
        rows = {}
        for op, owner in self._owners.items():
            if owner is None and (others := self._passed_over[op]):
                rows[op] = f"unfused: {', '.join(others)} was chosen"
            elif owner is None and op not in self._library.implements:
                rows[op] = f"unfused: {', '.join(self.OPS[op].stands_for)} in turn"
            elif owner is None:
                apart = self._apart(op)
                runs = "runs" if len(apart) == 1 else "run"
                rows[op] = f"unfused: {', '.join(apart)} {runs} on another library"
            elif owner is not self._reference:
                rows[op] = owner.describe().get(op, type(owner).__name__)
            elif op not in self._library.implements:
                rows[op] = f"torch ({reasons.get(op, 'the reference')})"
            else:
                rows[op] = "torch"
        return rows

    def library_of(self, op: str) -> OpLibrary | None:
        return self._owners[op]

    def refuses(self, how: Reuse) -> dict[str, str]:
        return {
            op: type(owner).__name__
            for op, owner in self._owners.items()
            if owner is not None and how not in owner.reuses
        }

    def recorder(self) -> Recorder | None:
        """The main library's, when no other library has a hand in it: torch's ops can be seen in a
        recording, those of a third library cannot."""
        known = (self._library, self._reference, None)
        others = [owner for owner in self._owners.values() if owner not in known]
        return None if others else self._library.recorder()

    def close(self) -> None:
        """Close every library in use, each once."""
        owners = {id(owner): owner for owner in (self._library, *self._owners.values()) if owner}
        for owner in owners.values():
            owner.close()

    def _owner(self, op: str, choice: Choice) -> OpLibrary:
        library = self._library if choice == "auto" else choice
        if op in library.implements:
            if _is_reference(library):
                return self._reference
            if op not in library.methods and not isinstance(library, TorchOps):
                raise PortError(
                    f"ops.{op}: {type(library).__name__} names it in `implements` and has no "
                    f"method {op}; write it, or name only what is there"
                )
            return library
        if choice == "auto":
            return self._reference
        reason = library.describe().get(op)
        raise ConfigError(
            f"ops.{op}: {type(library).__name__} does not implement it"
            f"{f' ({reason})' if reason else ''}; it has "
            f"{', '.join(sorted(library.implements)) or 'no op at all'}"
        )

    def _apart(self, fused: str) -> list[str]:
        """The members that run on another library than the fused op would."""
        whole = self._owner(fused, "auto")
        return [m for m in self.OPS[fused].stands_for if self._owners[m] is not whole]


def _check_methods(library: OpLibrary) -> None:
    """A method from outside of this project that would never run is an error."""
    reasons = library.describe()
    for op in sorted(library.methods - library.implements - reasons.keys()):
        if not getattr(type(library), op).__module__.startswith("vllm_di."):
            name = type(library).__name__
            raise PortError(
                f"{name} has a method {op}, and its `implements` does not name it, so it would "
                "never run; name it, or take the method out"
            )


def _is_reference(library: OpLibrary) -> bool:
    """Whether it is the plain reference, not a subclass with ops of its own."""
    return (
        isinstance(library, TorchOps)
        and not library.methods
        and len(library.implements) == len(library.OPS)
    )
