"""The command line: ``vllm-di VERB [group=option ...] [key.in.a.node=value ...] [--flags]``.

The verb is ours, the overrides behind it have Hydra's grammar. A verb's module is imported when the
verb is used.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_di.commands.arguments import EXIT_USAGE, VERBS, Arguments, UsageError, parse
from vllm_di.errors import ConfigError, VllmDiError, nearest
from vllm_di.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``vllm-di``. Exit status 2 for what the user got wrong, 1 for what failed
    later."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may know no more than ASCII
            stream.reconfigure(errors="backslashreplace")
    try:
        status = run(words)
    except (UsageError, ConfigError) as error:
        status = _complain(error, words, EXIT_USAGE)
    except VllmDiError as error:
        status = _complain(error, words, 1)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone
        status = 141
    sys.exit(status)


def run(words: list[str]) -> int:
    """Run one command; returns its exit status."""
    if not words or words[0] in ("-h", "--help"):
        return _module("help").run(Arguments())
    if words[0] in ("-V", "--version"):
        print(f"vllm-di {__version__}")
        return 0
    if words[0] == "--completion" or words[0] == "__complete":
        return _module("completion").run(words)
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise UsageError(
            f"no verb {verb!r}; the verb comes first, and there are {', '.join(VERBS)}"
            f"{nearest(verb, VERBS)}"
        )
    arguments = parse(verb, rest)
    if arguments.help:
        return _module("help").run(arguments)
    return _module(verb).run(arguments)


def _module(name: str) -> Command:
    module: Command = import_module(f"vllm_di.commands.{name.replace('-', '_')}")  # type: ignore[assignment]
    return module


class Command:
    """What a verb's module offers."""

    @staticmethod
    def run(arguments: object) -> int: ...  # type: ignore[empty-body]


def _complain(error: Exception, words: list[str], status: int) -> int:
    if "--debug" in words:
        raise error
    print(f"vllm-di: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
