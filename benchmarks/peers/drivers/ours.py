"""vllm-di through its Python API. Arguments: overrides."""

import sys

from common import serve

from vllm_di import LLM, SamplingParams

with LLM(overrides=["executor=inline", "device.threads=2", *sys.argv[1:]]) as llm:

    def generate(prompts, new):
        llm.engine.reset_prefix_cache()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))

    serve(generate)
