"""Words of the command line, apart: overrides, flags, plain words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_di.containers.overrides import model_overrides
from vllm_di.errors import VllmDiError, nearest

VERBS = {
    "serve": "serve the model over an OpenAI-compatible HTTP API",
    "chat": "talk to the model in the terminal",
    "complete": "continue a text",
    "run-batch": "answer a file of requests in OpenAI's batch form: run-batch FILE -o RESULTS",
    "bench": "measure latency, throughput or a server: bench latency|throughput|serve",
    "simulate": "what replicas, or prefill and decode apart, would do, by measured step times",
    "conform": "run the conformance suite on a platform",
    "explain": "which class fills each slot, and who chose it",
    "matrix": "which platform can do what, by recorded conformance reports",
    "new-port": "write a package of its own for new hardware, in ./vllm-di-NAME: new-port NAME",
    "vllm": "start vLLM with choices for its slots: vllm serve MODEL attention=sdpa -- FLAGS",
    "config": "show the composed config: config show",
    "help": "groups, options and their keys: help [GROUP[=OPTION]]",
}


WORDS = {
    "complete": '"PROMPT"',
    "run-batch": "FILE",
    "bench": "latency|throughput|serve",
    "simulate": "[measure]",
    "new-port": "NAME",
    "vllm": "serve MODEL",
    "config": "show",
    "help": "[GROUP[=OPTION]]",
}
"""Verb to the plain words that it takes."""
PASSES_ON = ("vllm",)
"""Verbs that hand what stands behind ``--`` to another program."""
WITHOUT_OVERRIDES = ("matrix", "new-port")
"""Verbs that compose no config."""


EXIT_USAGE = 2
"""Exit status for what the user got wrong."""


class UsageError(VllmDiError):
    """The command line cannot be understood."""


def _tensor_parallel(value: str) -> list[str]:
    return ["executor=multiprocess", f"executor.tensor_parallel_size={value}"]


def _otlp(value: str) -> list[str]:
    return ["tracing=otlp", f"tracing.endpoint={value}"]


def _key(key: str) -> Callable[[str], list[str]]:
    return lambda value: [f"{key}={value}"]


ALIASES: dict[str, tuple[Callable[[str], list[str]], str]] = {
    "--model": (model_overrides, "model=NAME, or model=local model.path=PATH"),
    "--host": (_key("server.host"), "server.host"),
    "--port": (_key("server.port"), "server.port"),
    "--api-key-file": (_key("server.api_key_file"), "server.api_key_file"),
    "--served-model-name": (_key("server.served_model_name"), "server.served_model_name"),
    "--ssl-certfile": (_key("server.tls.cert"), "server.tls.cert"),
    "--ssl-keyfile": (_key("server.tls.key"), "server.tls.key"),
    "--ssl-ca-certs": (_key("server.tls.client_ca"), "server.tls.client_ca"),
    "--otlp-traces-endpoint": (_otlp, "tracing=otlp tracing.endpoint"),
    "--max-model-len": (_key("model.max_model_len"), "model.max_model_len"),
    "--max-num-seqs": (_key("scheduler.max_num_seqs"), "scheduler.max_num_seqs"),
    "--dtype": (_key("model.dtype"), "model.dtype"),
    "--tensor-parallel-size": (
        _tensor_parallel,
        "executor=multiprocess executor.tensor_parallel_size",
    ),
}
"""Flags that users of vLLM expect: each stands for overrides."""

SWITCHES = {
    "--help": "this help; with a GROUP or GROUP=OPTION behind it, its keys",
    "--debug": "show the traceback of an error",
}
OPTIONS = {"--config-dir": "a folder of your own config groups; may be repeated"}

VERB_SWITCHES: dict[str, dict[str, str]] = {
    "explain": {"--json": "as data", "--no-ops": "do not build the op table"},
    "matrix": {
        "--json": "as data",
        "--markdown": "as tables for a page in this folder",
        "--html": "as a page in this folder",
    },
    "conform": {
        "--full": "the long forms of the long checks",
        "--list": "the checks, by the names that --only takes; nothing is run",
    },
    "config": {"--origins": "say where each value came from"},
    "bench": {"-m": "sweep: a value with commas is tried one by one"},
}
VERB_OPTIONS: dict[str, dict[str, str]] = {
    "matrix": {"--reports": "a folder of more reports"},
    "conform": {
        "--engine": "vllm: the adapters inside vLLM, each beside stock vLLM",
        "--level": "contract, compile or runtime (default): up to which checks",
        "--only": "names of checks or ids of cases, in one argument with spaces; gives no level",
        "--json": "file for the report",
        "--junit": "file for the report in JUnit's form",
        "--waivers": "YAML list of failures that somebody answers for",
        "--seed": "of generated cases",
    },
    "explain": {
        "--slot": "the alternatives for one slot",
        "--graph": "file for a picture (.svg) of containers and slots",
        "--engine": "vllm: the slots of vLLM, with the hook that carries each choice",
    },
    "chat": {
        "--temperature": "0 is greedy",
        "--max-tokens": "longest answer",
        "--system": "prompt",
    },
    "complete": {"--temperature": "0 is greedy", "--max-tokens": "longest answer"},
    "run-batch": {
        "-o": "file for the results; default: standard output",
        "--concurrency": "requests at once; default: 256",
    },
    "bench": {
        "--input-len": "tokens of a prompt",
        "--output-len": "tokens of an answer",
        "--batch-size": "requests at once (latency)",
        "--num-prompts": "requests in all (throughput, serve)",
        "--concurrency": "requests at once (serve)",
        "--request-rate": "requests a second (serve); default: as many as concurrency allows",
        "--base-url": "a server that runs already (serve)",
        "--seed": "of the first run's prompts; 0 (serve)",
        "--warmup": "runs that are not counted",
        "--repeats": "counted runs",
        "--json": "file for the results",
    },
    "simulate": {
        "--steps": "file of step times; repeated, one for each platform",
        "--layout": "overrides of one column, in quotes; may be repeated",
        "--num-prompts": "requests in all; default: 1000",
        "--request-rate": "requests a second, as a Poisson process",
        "--concurrency": "requests at a time, where no rate is given; default: 16",
        "--input-len": "of a prompt: N, uniform:LEAST,MOST or lognormal:MEDIAN,SIGMA; default: 128",
        "--output-len": "of an answer, in the same forms; default: 64",
        "--prefixes": "different beginnings that requests share; default: 0",
        "--prefix-len": "tokens of each beginning, before those of --input-len; default: 256",
        "--prefix-share": "of the requests, those with such a beginning, 0 to 1; default: 1",
        "--seed": "of the requests; default: 0",
        "--bandwidth": "between prefill and decode, a second: 10GB",
        "--json": "file for the results",
        "-o": "file for the step times (measure)",
        "--repeats": "rounds (measure); default: 2",
        "--clock": "wall or processor, by which steps are timed (measure); default: wall",
    },
}


REPEATED = {"simulate": ("--steps", "--layout")}
"""Options that may be given several times, each with a value of its own."""


@dataclass
class Arguments:
    """A command line, understood."""

    verb: str = ""
    overrides: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """Neither override nor flag: a prompt, a sub-verb, a slot."""
    options: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    """Of the options that may be repeated."""
    switches: set[str] = field(default_factory=set)
    config_dirs: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    """What stands behind ``--``, for a verb that passes it on."""

    @property
    def help(self) -> bool:
        return "--help" in self.switches

    def number(self, name: str, default: int, least: int = 1) -> int:
        """A whole number of ``least`` or more. Raises UsageError."""
        text = self.options.get(name)
        if text is None:
            return default
        if not text.isdigit() or int(text) < least:
            raise UsageError(f"{name}: expected a number of {least} or more, got {text!r}")
        return int(text)

    def real(self, name: str, default: float) -> float:
        """A number of 0 or more. Raises UsageError."""
        text = self.options.get(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UsageError(f"{name}: expected a number of 0 or more, got {text!r}")
        return value


def parse(verb: str, words: list[str]) -> Arguments:
    """Sort the words behind a verb. Raises UsageError with the nearest flag."""
    found = Arguments(verb=verb)
    switches = SWITCHES | VERB_SWITCHES.get(verb, {})
    options = OPTIONS | VERB_OPTIONS.get(verb, {})
    if verb in PASSES_ON and "--" in words:
        cut = words.index("--")
        words, found.rest = words[:cut], words[cut + 1 :]
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "-h":
            found.switches.add("--help")
        elif word in switches:
            found.switches.add(word)
        elif name in options or name in ALIASES:
            if not equals:
                value = next(rest, "")
                if not value or value.startswith("--"):
                    raise UsageError(f"{name} needs a value")
            if name == "--config-dir":
                found.config_dirs.append(value)
            elif name in ALIASES and name not in options:
                found.overrides += ALIASES[name][0](value)
            elif name in REPEATED.get(verb, ()):
                found.lists.setdefault(name, []).append(value)
            else:
                found.options[name] = value
        elif word.startswith("-") and len(word) > 1:
            known = [*switches, *options, *ALIASES]
            raise UsageError(f"{verb} has no flag {name!r}{nearest(name, known)}")
        elif (equals and " " not in name) or word.startswith("~"):
            found.overrides.append(word)
        else:
            found.words.append(word)
    return found


def engine(arguments: Arguments) -> str | None:
    """The other engine that ``--engine`` names. Raises UsageError."""
    name = arguments.options.get("--engine")
    if name not in (None, "vllm"):
        raise UsageError(f"--engine {name}: there is vllm{nearest(str(name), ['vllm'])}")
    return name


def no_words(arguments: Arguments) -> None:
    """Refuse plain words where a verb takes none."""
    if arguments.words:
        raise UsageError(
            f"{arguments.words[0]!r} is no override; write key=value or group=option, "
            "e.g. model=llama3"
        )
