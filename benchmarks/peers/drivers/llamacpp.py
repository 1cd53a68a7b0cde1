"""llama.cpp through llama-cpp-python's low-level API: one decode call a step for all sequences.
Argument: a GGUF file."""

import ctypes
import sys

import llama_cpp as api
from common import serve

SEQUENCES, BATCH = 32, 4096
api.llama_backend_init()
silent = api.llama_log_callback(lambda *_: None)
api.llama_log_set(silent, ctypes.c_void_p(0))
model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
settings = api.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_seq_max = SEQUENCES * 512, BATCH, SEQUENCES
settings.n_threads = settings.n_threads_batch = 2
settings.kv_unified = True
context = api.llama_init_from_model(model, settings)
batch = api.llama_batch_init(BATCH, 0, 1)
greedy = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
api.llama_sampler_chain_add(greedy, api.llama_sampler_init_greedy())


def put(row, token, position, sequence, wanted):
    batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
    batch.n_seq_id[row] = 1
    batch.seq_id[row][0] = sequence


def step(rows):
    batch.n_tokens = rows
    if api.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")


def generate(prompts, new):
    api.llama_memory_clear(api.llama_get_memory(context), True)
    row, last = 0, []
    for sequence, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            put(row, token, position, sequence, position == len(prompt) - 1)
            row += 1
        last.append(row - 1)
    step(row)
    tokens = [api.llama_sampler_sample(greedy, context, at) for at in last]
    for made in range(1, new):
        for sequence, token in enumerate(tokens):
            put(sequence, token, len(prompts[sequence]) + made - 1, sequence, True)
        step(len(prompts))
        tokens = [api.llama_sampler_sample(greedy, context, at) for at in range(len(prompts))]


def cache():
    """16 bits a number, all of it zeroed at the start."""
    head = api.llama_model_n_embd(model) // api.llama_model_n_head(model)
    width = head * api.llama_model_n_head_kv(model)
    return settings.n_ctx * api.llama_model_n_layer(model) * 2 * width * 2


serve(generate, cache)
