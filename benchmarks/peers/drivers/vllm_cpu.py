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
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        **(random if "random" in sys.argv else {}),
    )

    def generate(prompts, new, keep, tell):
        if not keep:
            llm.reset_prefix_cache()
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine, seen = llm.llm_engine, [0] * len(prompts)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, settings)
        while engine.has_unfinished_requests():
            for output in engine.step():
                i, count = int(output.request_id), len(output.outputs[0].token_ids)
                for _ in range(count - seen[i]):
                    tell(i)
                seen[i] = count

    serve(generate, lambda: int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) << 30)


if __name__ == "__main__":  # its engine process imports this file again
    main()
