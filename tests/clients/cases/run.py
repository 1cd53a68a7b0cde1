"""``python run.py CASE URL``: run in a client's own environment. Calls each function of the module
CASE whose name begins with ``check_``, in order, and prints what failed."""

from __future__ import annotations

import importlib
import sys
import traceback


def main(case: str, url: str) -> int:
    module = importlib.import_module(case)
    failed = []
    for name, function in list(vars(module).items()):
        if not name.startswith("check_"):
            continue
        try:
            function(url)
            sys.stdout.write(f"{name}: good\n")
        except Exception:
            failed.append(name)
            sys.stdout.write(f"{name}: failed\n{traceback.format_exc()}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
