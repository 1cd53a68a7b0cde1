"""The rows of the table: what is asked of the engines, and what the machine allows."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from benchmarks.peers.roofline import Roofline


class Model(msgspec.Struct, frozen=True):
    """Sizes that the bounds need."""

    name: str
    vocab_size: int
    layers: int
    hidden: int
    kv_width: int
    """Key heads times head size."""
    layer_weights: float
    """Of all layers: a token multiplies each once."""
    head_weights: float
    bytes: dict[str, float]
    """That a decode step reads, by the kind of weights."""

    @property
    def kv_bytes(self) -> int:
        """Of a token in the cache, 16 bits."""
        return self.layers * 2 * self.kv_width * 2


SMOLLM2 = Model(
    name="SmolLM2-135M-Instruct",
    vocab_size=40_000,  # ids above are not drawn
    layers=30,
    hidden=576,
    kv_width=192,
    layer_weights=106.2e6,
    head_weights=28.3e6,
    bytes={"bf16": 269e6, "int8": 135e6, "4-bit": 98e6},
)
LLAMA_1B = Model(
    name="Llama-3.2-1B shapes, random weights",
    vocab_size=40_000,
    layers=16,
    hidden=2048,
    kv_width=512,
    layer_weights=973.1e6,
    head_weights=262.7e6,
    bytes={"bf16": 2471.6e6},
)


class Work(msgspec.Struct, frozen=True):
    """Prompts of one length, answered at once."""

    name: str
    title: str
    batch: int
    given: int
    new: int
    """Tokens of an answer; 1: the prefill is measured, else the decode after it."""
    model: Model = SMOLLM2
    cached: bool = False
    """The prompt ran just before: the time to the first token is measured."""

    @property
    def unit(self) -> str:
        return "ms" if self.cached else "tokens/s"


WORKS = [
    Work("decode-1", "decode, batch 1", 1, 128, 65),
    Work("decode-8", "decode, batch 8", 8, 128, 65),
    Work("decode-32", "decode, batch 32", 32, 128, 65),
    Work("prefill-8x512", "prefill, 8 x 512", 8, 512, 1),
    Work("prefill-1x1024", "prefill, 1 x 1,024", 1, 1024, 1),
    Work("decode-1-8k", "decode, batch 1, after 8,000 tokens", 1, 8000, 33),
    Work("prefill-1x8000", "prefill, 1 x 8,000", 1, 8000, 1),
    Work("cached-1x1024", "first token, 1,024 tokens in the prefix cache", 1, 1024, 1, cached=True),
    Work("prefill-1x1024-1b", "prefill, 1 x 1,024, Llama-3.2-1B shapes", 1, 1024, 1, LLAMA_1B),
    Work("decode-1-1b", "decode, batch 1, Llama-3.2-1B shapes", 1, 128, 65, LLAMA_1B),
]
TITLES = {work.name: work.title for work in WORKS if work.model is SMOLLM2} | {
    "prefill-1x1024-1b": "prefill, 1 x 1,024, Llama-3.2-1B shapes",
    "start": "command to first token, library",
    "memory": "memory beside the KV cache",
    "server-start": "command to first token, server",
    "decode-1-1b": "decode, batch 1, Llama-3.2-1B shapes",
    "server": "server, 64 requests, 128 to 64 tokens, 16 at once",
    "server-ttft-p50": "server, time to first token, p50",
    "server-ttft-p99": "server, time to first token, p99",
    "server-itl-p50": "server, between two tokens, p50",
    "server-itl-p99": "server, between two tokens, p99",
}
"""All rows in the order of the report."""


WEIGHTS = ["bf16", "int8", "4-bit"]
ENGINES = ["vllm-di", "llama.cpp", "OpenVINO", "vLLM", "transformers"]


class Figure(msgspec.Struct):
    """One engine's values in one row, one for each round."""

    row: str
    weights: str
    engine: str
    unit: str
    """``tokens/s`` (more is better), ``s``, ``ms`` or ``MB`` (less is)."""
    values: list[float] = []
    limit: float = 0.0
    """What this machine allowed in the same run; 0: no bound is known."""
    failed: str = ""
    """Why there are no values."""
    by_steps: bool = False
    """Decode from the time of each step; False: from the difference of two runs, as once."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.row, self.weights, self.engine

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else 0.0

    def times_better(self, other: Figure) -> float:
        """1.5: this one is one and a half times as good as the other."""
        more = self.unit == "tokens/s"
        return self.median / other.median if more else other.median / self.median


class Machine(msgspec.Struct):
    """The newest figure of each row, weights and engine, on one make of CPU."""

    cpu: str
    """Which one, and how many of its cores."""
    date: str
    """Of the newest run."""
    notes: list[str] = []
    """What a reader must know of these figures."""
    figures: list[Figure] = []
    rooflines: dict[str, Roofline] = {}
    """Row and weights -> what the machine gave in that run."""

    def replace(self, figures: list[Figure], roofline: Roofline | None = None) -> None:
        new = {figure.key: figure for figure in figures}
        kept = [f for f in self.figures if f.key not in new]
        self.figures = sorted([*kept, *figures], key=_place)
        if roofline is not None:
            self.rooflines |= {f"{f.row} {f.weights}": roofline for f in figures}


MAKES = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel", "": "Arm"}
"""``vendor_id`` of /proc/cpuinfo, which Arm's has not, to the make."""


class Results(msgspec.Struct):
    """``results.json``: a machine for each make that was measured."""

    machines: dict[str, Machine] = {}

    def here(self, cpu: str, date: str) -> Machine:
        """The machine of this CPU's make; figures of another model of it are dropped, for rows of
        two machines have no ratio."""
        known = self.machines.get(make())
        if known is None or known.cpu != cpu:
            known = self.machines[make()] = Machine(cpu, date)
        known.date = date
        return known


def make(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Whose CPU this is, as MAKES calls it, or as it calls itself."""
    lines = cpuinfo.read_text().splitlines()
    vendor = next((x.partition(":")[2].strip() for x in lines if x.startswith("vendor_id")), "")
    return MAKES.get(vendor, vendor)


def _place(figure: Figure) -> tuple[int, int, int]:
    rows = list(TITLES)
    return (
        rows.index(figure.row),
        WEIGHTS.index(figure.weights),
        ENGINES.index(figure.engine),
    )


def limit(work: Work, weights: str, roofline: Roofline) -> float:
    """Decode: weights and KV read once a step, or the products, whichever takes longer. Prefill:
    products of the layers and attention."""
    model = work.model
    speed = roofline.bf16 if weights == "bf16" else roofline.int8
    if work.new == 1:
        attention = model.layers * 4 * model.hidden * work.given / 2  # operations of a token
        return 1 / (2 * model.layer_weights / speed + attention / roofline.bf16)
    context = work.given + work.new / 2
    read = (model.bytes[weights] + work.batch * context * model.kv_bytes) / roofline.read
    products = 2 * (model.layer_weights + model.head_weights) * work.batch / speed
    return work.batch / max(read, products)


SERVER_GIVEN, SERVER_NEW, SERVER_REQUESTS, SERVER_AT_ONCE = 128, 64, 64, 16


def server_limit(weights: str, roofline: Roofline) -> float:
    """All prefills at their bound, then all decode steps with full batches at theirs."""
    prefill = Work("", "", SERVER_AT_ONCE, SERVER_GIVEN, 1)
    decode = Work("", "", SERVER_AT_ONCE, SERVER_GIVEN, SERVER_NEW)
    given = SERVER_REQUESTS * SERVER_GIVEN / limit(prefill, weights, roofline)
    made = SERVER_REQUESTS * (SERVER_NEW - 1) / limit(decode, weights, roofline)
    return SERVER_REQUESTS * SERVER_NEW / (given + made)
