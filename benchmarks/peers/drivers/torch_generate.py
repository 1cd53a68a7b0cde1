"""transformers' ``generate``. Argument: a folder."""

import sys

import torch
from common import serve
from transformers import AutoModelForCausalLM

torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()


@torch.inference_mode()
def generate(prompts, new, keep, tell):
    if keep:
        raise RuntimeError("no prefix cache")

    def told(input_ids, scores, **rest):
        for i in range(len(prompts)):
            tell(i)
        return torch.zeros(len(prompts), dtype=torch.bool)

    ids = torch.tensor(prompts)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        stopping_criteria=[told],  # called after each step
    )


serve(generate)
