"""What the drivers share: one job a line on standard input, one answer a line on standard output.

A driver runs in its engine's environment, so this file imports nothing but the standard library. A
job is ``{"prompts": [[ids]], "new": N, "keep": BOOL}``; the answer ``{"times": [[S]]}``: for each
prompt the seconds from the job's start to each of its tokens. ``keep``: what the prefix cache holds
of earlier jobs may be used; an engine without one answers with an error. ``{"cache": true}`` asks
how many bytes the KV cache takes of the memory; the answer is ``{"cache": BYTES}``. What fails is
``{"error": TEXT}``.
"""

import json
import os
import sys
import time

OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what engines print goes to standard error


def serve(generate, cache=lambda: 0):
    """``generate(prompts, new, keep, tell)`` calls ``tell(i)`` for each token of prompt i as it
    comes, and returns after ``new`` of each; ``cache()`` is the KV cache's part of the resident
    memory, bytes."""
    print(json.dumps({"ready": True}), file=OUT, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if "cache" in job:
                answer = {"cache": cache()}
            else:
                keep = job.get("keep", False)
                answer = {"times": measured(generate, job["prompts"], job["new"], keep)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=OUT, flush=True)


def measured(generate, prompts, new, keep):
    times = [[] for _ in prompts]
    begin = time.perf_counter()
    generate(prompts, new, keep, lambda i: times[i].append(time.perf_counter() - begin))
    if {len(of_prompt) for of_prompt in times} != {new}:
        raise RuntimeError(f"answers of {[len(t) for t in times]} tokens, not {new}")
    return times
