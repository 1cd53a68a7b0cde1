"""What the drivers share: one job a line on standard input, one answer a line on standard output.

A driver runs in its engine's environment, so this file imports nothing but the standard library. A
job is ``{"prompts": [[ids]], "new": N}``; the answer ``{"seconds": S}``. ``{"cache": true}`` asks
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
    """``generate(prompts, new)`` returns after ``new`` tokens for each prompt; ``cache()`` is the
    KV cache's part of the resident memory, bytes."""
    print(json.dumps({"ready": True}), file=OUT, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if "cache" in job:
                answer = {"cache": cache()}
            else:
                begin = time.perf_counter()
                generate(job["prompts"], job["new"])
                answer = {"seconds": time.perf_counter() - begin}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=OUT, flush=True)
