"""Without its driver the port says what is missing, and nothing else runs in its place."""

from __future__ import annotations

import subprocess
import sys

from vllm_di.conformance.outcomes import NotDeclared
from vllm_di.conformance.subject import Subject

BLOCKED = """
import sys
blocked = sys.argv.pop(1).split(",")
class Without:  # an import fails, and a question whether the module is there is answered with no
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] not in blocked
        return self.finder.find_spec(name, path, target) if known else None
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from vllm_di.cli import main
main(sys.argv[1:])
"""


def test_the_error_says_what_is_missing(subject: Subject) -> None:
    modules = [m for m in subject.manifest.packages if m not in ("torch", "vllm_di")]
    if not modules and not subject.lacks_driver:
        raise NotDeclared("it needs no package beside torch, and its driver is here")
    names = modules or [subject.manifest.name]
    real = [o for o in subject.overrides if not o.startswith(("device.simulated", "+device.sim"))]
    command = [sys.executable, "-c", BLOCKED, ",".join(modules)]
    command += ["complete", *real, *subject.layers(), "model=tiny", "--max-tokens", "3", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0, f"it answered all the same: {done.stdout[-500:]}"
    assert not done.stdout.strip(), f"it printed {done.stdout[-500:]}"
    said = done.stderr
    assert "Traceback" not in said, said[-2000:]
    assert any(name in said for name in names), f"names none of {names}: {said[-500:]}"
    assert "install" in said, f"does not say how to install it: {said[-500:]}"
