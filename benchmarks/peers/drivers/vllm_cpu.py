"""vLLM's CPU build. Arguments: a folder; ``random`` where it holds a config alone."""

import os
import sys

from common import serve
from vllm import LLM, SamplingParams


def main():
    random = {"load_format": "dummy", "skip_tokenizer_init": True}
    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        **(random if "random" in sys.argv else {}),
    )

    def generate(prompts, new):
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate(inputs, settings, use_tqdm=False)

    serve(generate, lambda: int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) << 30)


if __name__ == "__main__":  # its engine process imports this file again
    main()
