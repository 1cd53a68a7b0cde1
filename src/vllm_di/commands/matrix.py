"""``vllm-di matrix``: which platform can do what, by recorded conformance reports."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import msgspec

from vllm_di.commands.arguments import Arguments, UsageError, no_words
from vllm_di.commands.say import warn
from vllm_di.commands.table import print_table
from vllm_di.conformance import matrix, matrix_html, matrix_vllm
from vllm_di.containers.evidence import report_files, vllm_report_files
from vllm_di.containers.tree import ConfigFiles
from vllm_di.version import __version__


def run(arguments: Arguments) -> int:
    """A table, data (``--json``), Markdown (``--markdown``) or a page (``--html``), as of today."""
    no_words(arguments)
    if arguments.overrides:
        raise UsageError(f"matrix takes no overrides, and {arguments.overrides[0]!r} is one")
    tree = ConfigFiles.find(arguments.config_dirs)
    files = report_files(tree)
    if folder := arguments.options.get("--reports"):
        if not Path(folder).is_dir():
            raise UsageError(f"--reports {folder}: no such folder")
        files += Path(folder).glob("*.json")
    today = datetime.datetime.now(datetime.UTC).date()
    found = matrix.build(tree, files, __version__, today, vllm_report_files())
    warn(found.problems)
    if "--json" in arguments.switches:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
    elif "--markdown" in arguments.switches:
        sys.stdout.write(matrix.markdown(found, Path.cwd() / "page.md"))
    elif "--html" in arguments.switches:
        sys.stdout.write(matrix_html.html(found, Path.cwd() / "page.html"))
    else:
        print_table(matrix.HEAD, matrix.evidence_rows(found))
        print()
        names = [column.name for column in found.platforms]
        print_table(["feature", *names], matrix.feature_rows(found))
        if found.vllm:
            print()
            print_table(matrix_vllm.HEAD, matrix_vllm.run_rows(found.vllm, matrix.SHOWN))
    return 0
