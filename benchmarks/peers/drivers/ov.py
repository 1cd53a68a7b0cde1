"""OpenVINO GenAI's continuous batching. Argument: a folder of its own format, or a GGUF file. Its
cache grows with what is asked: for one short prompt it counts as nothing."""

import itertools
import sys

import numpy as np
import openvino
import openvino_genai as genai
from common import serve

schedule = genai.SchedulerConfig()
schedule.cache_size = 2
schedule.max_num_seqs = 64
schedule.max_num_batched_tokens = 4096
schedule.dynamic_split_fuse = True
schedule.enable_prefix_caching = True  # it cannot be emptied: no two rows share a prompt
properties = {"INFERENCE_NUM_THREADS": 2}
pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], schedule, "CPU", properties)


numbers = itertools.count()


def generate(prompts, new, keep, tell):
    settings = genai.GenerationConfig()
    settings.max_new_tokens = settings.min_new_tokens = new
    settings.ignore_eos, settings.do_sample, settings.eos_token_id = True, False, -1
    settings.apply_chat_template = False
    handles = [
        pipeline.add_request(
            next(numbers), openvino.Tensor(np.array([prompt], dtype=np.int64)), settings
        )
        for prompt in prompts
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for i, handle in enumerate(handles):
            while handle.can_read():
                for output in handle.read().values():
                    for _ in output.generated_ids:
                        tell(i)


serve(generate)
