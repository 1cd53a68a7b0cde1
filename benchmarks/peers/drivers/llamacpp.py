"""llama.cpp through llama-cpp-python's low-level API: one decode call a step for all sequences.
Argument: a GGUF file."""

import ctypes
import sys

import llama_cpp as api
from common import serve

BATCH = 4096
api.llama_backend_init()
silent = api.llama_log_callback(lambda *_: None)
api.llama_log_set(silent, ctypes.c_void_p(0))
model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
batch = api.llama_batch_init(BATCH, 0, 1)
greedy = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
api.llama_sampler_chain_add(greedy, api.llama_sampler_init_greedy())


class Context:
    """A cache for so many sequences of so many tokens each; made anew for a job that is larger.
    Each sequence has cells of its own: in a unified cache each would attend over all."""

    def __init__(self):
        self.shape, self.made = (0, 0), None

    def fit(self, sequences, tokens):
        """-> whether what it held is still there."""
        if sequences <= self.shape[0] and tokens <= self.shape[1]:
            return True
        if self.made is not None:
            api.llama_free(self.made)
        self.shape = sequences, -(-tokens // 256) * 256
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch = self.shape[0] * self.shape[1], BATCH
        settings.n_seq_max, settings.kv_unified = sequences, False
        settings.n_threads = settings.n_threads_batch = 2
        self.made = api.llama_init_from_model(model, settings)
        return False


context = Context()
context.fit(1, 512)  # for the first token of a start, and its memory


def put(row, token, position, sequence, wanted):
    batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
    batch.n_seq_id[row] = 1
    batch.seq_id[row][0] = sequence


def step(rows):
    """Run the rows that were put; rows of logits that are wanted can be sampled then."""
    batch.n_tokens = rows
    if api.llama_decode(context.made, batch):
        raise RuntimeError("llama_decode failed")


def sample(row):
    return api.llama_sampler_sample(greedy, context.made, row)


def generate(prompts, new, keep, tell):
    kept = context.fit(len(prompts), max(map(len, prompts)) + new)
    memory = api.llama_get_memory(context.made)
    if not keep:
        api.llama_memory_clear(memory, True)
    elif not kept:
        raise RuntimeError("the cache was made anew, so nothing of it is kept")
    row, first, waiting = 0, {}, []
    for sequence, prompt in enumerate(prompts):
        start = len(prompt) - 1 if keep else 0  # kept: all but the last token is in the cache
        if keep:
            api.llama_memory_seq_rm(memory, sequence, start, -1)
        for position in range(start, len(prompt)):
            is_last = position == len(prompt) - 1
            put(row, prompt[position], position, sequence, is_last)
            if is_last:
                waiting.append((sequence, row))
            row += 1
            if row == BATCH or (is_last and sequence == len(prompts) - 1):
                step(row)
                for at, place in waiting:
                    first[at] = sample(place)
                    tell(at)
                row, waiting = 0, []
    tokens = [first[sequence] for sequence in range(len(prompts))]
    for made in range(1, new):
        for sequence, token in enumerate(tokens):
            put(sequence, token, len(prompts[sequence]) + made - 1, sequence, True)
        step(len(prompts))
        tokens = [sample(at) for at in range(len(prompts))]
        for sequence in range(len(prompts)):
            tell(sequence)


def cache():
    """16 bits a number, all of it zeroed at the start."""
    head = api.llama_model_n_embd(model) // api.llama_model_n_head(model)
    width = head * api.llama_model_n_head_kv(model)
    tokens = context.shape[0] * context.shape[1]
    return tokens * api.llama_model_n_layer(model) * 2 * width * 2


serve(generate, cache)
