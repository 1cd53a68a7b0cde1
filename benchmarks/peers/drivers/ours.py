"""vllm-di through its Python API. Arguments: overrides."""

import ctypes
import gc
import mmap
import sys

from common import serve

from vllm_di import LLM, SamplingParams
from vllm_di.components.interfaces import LayerCache


def cache():
    """The blocks are handed out by the system as they are touched: count the pages that are."""
    layers = [o for o in gc.get_objects() if type(o) is LayerCache]
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    spans = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    return sum(resident(start, size) for start, size in spans)


def resident(start, size):
    start -= start % mmap.PAGESIZE
    pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


COMMON = [
    "executor=inline",
    "device.threads=2",
    "scheduler.max_num_batched_tokens=4096",
    "scheduler.max_step_ms=null",
]
with LLM(overrides=[*COMMON, *sys.argv[1:]]) as llm:

    def generate(prompts, new, keep, tell):
        if not keep:
            llm.engine.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        generations = [llm._start(prompt, params, False) for prompt in prompts]
        owner = {}
        for i, generation in enumerate(generations):
            owner.update((request.request_id, (i, generation)) for request in generation.requests)
            llm._add(generation)
        while llm.engine.has_work():
            for output in llm.engine.step().outputs:
                i, generation = owner[output.request_id]
                generation.feed(output)
                for _ in output.token_ids:
                    tell(i)

    serve(generate, cache)
