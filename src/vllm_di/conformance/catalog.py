"""The checks, in the order in which they run: the report's own is the last.
Check NAME is the file ``checks/test_NAME.py``."""

from __future__ import annotations

from typing import NamedTuple

from vllm_di.conformance.report import Required


class Check(NamedTuple):
    number: int
    name: str
    required: Required
    """The lowest level that requires it."""
    title: str


CHECKS = (
    Check(1, "manifest", "declared", "Manifest and interface version"),
    Check(2, "imports", "declared", "Importing the port changes nothing outside it"),
    Check(3, "absence", "declared", "Without its driver the port says what is missing"),
    Check(4, "config", "declared", "Config composes, round-trips, refuses bad values"),
    Check(5, "graph", "declared", "Every slot resolves and can be overridden"),
    Check(6, "lifecycle", "contract", "Start and stop leave nothing behind"),
    Check(7, "device", "contract", "Device report"),
    Check(8, "ops", "contract", "Every op equals the reference"),
    Check(9, "prefill", "contract", "Attention over whole prompts"),
    Check(10, "decode", "contract", "Paged attention of decodes, poisoned slots"),
    Check(11, "chunks", "contract", "Chunked prompts and mixed batches"),
    Check(12, "kv", "contract", "KV writes and copies, bit for bit"),
    Check(13, "communicator", "contract", "Collectives"),
    Check(14, "sampler", "contract", "Sampler"),
    Check(27, "masks", "contract", "Masks of tokens: structured output"),
    Check(15, "weights", "runtime", "Weights: every tensor is taken, wrong ones are refused"),
    Check(16, "golden", "runtime", "Greedy tokens of tiny models"),
    Check(17, "logprobs", "runtime", "Log-probabilities of tiny models"),
    Check(29, "pooling", "runtime", "Vectors of prompts: the last token, the mean, the first"),
    Check(18, "batching", "runtime", "Answers do not depend on the batch"),
    Check(19, "graphs", "runtime", "Captured graphs and padded shapes equal eager"),
    Check(20, "cache", "runtime", "Prefix cache, preemption, abort"),
    Check(21, "memory", "runtime", "Memory bound"),
    Check(28, "handover", "runtime", "The KV cache handed over to and from another platform"),
    Check(22, "faults", "runtime", "A worker that dies or hangs"),
    Check(23, "api", "runtime", "API smoke"),
    Check(24, "soak", "runtime", "Mixed load without losses or leaks"),
    Check(26, "compile", "compile", "Kernels compile for the real targets, within their bars"),
    Check(25, "report", "contract", "The report itself"),
)
BY_NAME = {check.name: check for check in CHECKS}
