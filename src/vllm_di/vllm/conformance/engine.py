"""One engine of vLLM's, asked for tokens: what runs in a case's process, and its model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LAYERS, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 3, 8, 4, 256, 1000
NUM_PROMPTS, NEW = 20, 32
BLOCK = 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path) -> Path:
    """A Llama of random weights, the same each time."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    head = HIDDEN // HEADS
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        before = f"model.layers.{layer}."
        shapes |= {
            f"{before}self_attn.q_proj": (HEADS * head, HIDDEN),
            f"{before}self_attn.k_proj": (KV_HEADS * head, HIDDEN),
            f"{before}self_attn.v_proj": (KV_HEADS * head, HIDDEN),
            f"{before}self_attn.o_proj": (HIDDEN, HEADS * head),
            f"{before}mlp.gate_proj": (2 * HIDDEN, HIDDEN),
            f"{before}mlp.up_proj": (2 * HIDDEN, HIDDEN),
            f"{before}mlp.down_proj": (HIDDEN, 2 * HIDDEN),
        }
    weights = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 1.5 / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    norms = ["model.norm"]
    for layer in range(LAYERS):
        norms += [f"model.layers.{layer}.{n}_layernorm" for n in ("input", "post_attention")]
    weights |= {f"{name}.weight": torch.rand(HIDDEN, generator=generator) + 0.5 for name in norms}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def prompts() -> list[list[int]]:
    """Token ids: 5 to 81 of them, the later half with a common beginning of two blocks."""
    common = [(7 * i) % 900 + 10 for i in range(2 * BLOCK)]
    found = []
    for index in range(NUM_PROMPTS):
        own = [(31 * index + 17 * i * i) % 900 + 10 for i in range(5 + 3 * (index % 5))]
        found.append(own if index < NUM_PROMPTS // 2 else [*common, *own])
    return found


def answer(
    model: str, overrides: list[str], arguments: dict[str, Any], result: str, log: str
) -> None:
    """Write what one engine says to ``result``: tokens, what each worker holds and has called,
    metrics; or the error that kept it from starting."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions go to workers
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"
    try:
        found = _ask(model, overrides, arguments)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(result).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # threads of vLLM's may be waiting


def _ask(model: str, overrides: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    given: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "block_size": BLOCK,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "seed": 0,
        **arguments,
    }
    if overrides:
        given["additional_config"] = {"vllm_di": overrides}
    llm = LLM(model, **given)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], params)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "reports": llm.collective_rpc(report),
        "metrics": {m.name: getattr(m, "value", None) for m in llm.get_metrics()},
    }


def report(worker: Any) -> dict[str, Any]:
    """What a worker's process holds, and what it has called."""
    from vllm_di.vllm.verify import held

    found = {"held": held(worker), "calls": {}}
    if hasattr(worker, "vllm_di_report"):
        found = worker.vllm_di_report()
    priority = worker.vllm_config.kernel_config.ir_op_priority.rms_norm
    found["held"]["ir_op_priority"] = priority[:1]
    if samples := sys.modules.get("vllm_di.vllm.conformance.samples"):
        found["calls"] = {**found["calls"], **samples.CALLS}
    return found
