"""OpenVINO GenAI's continuous batching. Argument: a folder of its own format, or a GGUF file. Its
cache grows with what is asked: for one short prompt it counts as nothing."""

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
schedule.enable_prefix_caching = False
properties = {"INFERENCE_NUM_THREADS": 2}
pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], schedule, "CPU", properties)


def generate(prompts, new):
    settings = genai.GenerationConfig()
    settings.max_new_tokens = settings.min_new_tokens = new
    settings.ignore_eos, settings.do_sample, settings.eos_token_id = True, False, -1
    settings.apply_chat_template = False
    tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    answers = pipeline.generate(tensors, [settings] * len(prompts))
    assert all(len(answer.m_generation_ids[0]) == new for answer in answers)


serve(generate)
