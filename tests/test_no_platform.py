"""Only ports and kernels know vendors: elsewhere nobody imports a vendor's package or asks which
platform this is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_di
from vllm_di.containers.tree import ConfigFiles

SOURCES = Path(vllm_di.__file__).parent
APART = ("ports", "kernels")

VENDORS = {
    *("torch_npu", "acl", "mindspore", "mindietorch", "atb_speed"),
    *("openvino", "optimum", "openvino_tokenizers", "nncf"),
    *("triton", "cupy", "pycuda", "cuda", "pynvml", "tensorrt", "flashinfer", "flash_attn"),
    *("flash_attn_interface", "xformers", "transformer_engine", "deep_gemm", "cutlass"),
    *("amdsmi", "aiter", "intel_extension_for_pytorch", "vllm_xpu_kernels"),
    *("torch_xla", "jax", "jaxlib", "tpu_inference", "torchax"),
    *("habana_frameworks", "torch_neuronx", "neuronxcc", "neuronx_distributed", "nki"),
    *("ttnn", "torch_spyre", "torch_mlu", "torch_musa", "torch_gcu", "furiosa", "rebel"),
}
NAMES = {
    *ConfigFiles.find().options("platform"),
    *("cuda", "rocm", "hip", "xpu", "npu", "hpu", "ascend", "openvino", "tpu", "xla", "neuron"),
    *("gaudi", "spyre", "mlu", "musa", "privateuseone", "privateuse1", "mps"),
}


def files() -> list[Path]:
    found = sorted(SOURCES.rglob("*.py"))
    return [f for f in found if f.relative_to(SOURCES).parts[0] not in APART]


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what is wrong)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt | ast.expr | ast.pattern):
            continue
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            modules = [*_strings(node.args[0])] if node.args else []
        for module in modules:
            if module.split(".")[0] in VENDORS:
                yield node.lineno, f"imports {module}"
        compared: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Call) and _called(node) in ("startswith", "endswith"):
            compared = [*node.args]
        for part in compared:
            for text in _strings(part):
                if text.lower().partition(":")[0] in NAMES:
                    yield part.lineno, f"compares with {text!r}"


def _called(node: ast.Call) -> str:
    function = node.func
    return str(getattr(function, "attr", getattr(function, "id", "")))


def _strings(node: ast.AST) -> Iterator[str]:
    """A string constant, or those in a literal list, tuple or set."""
    for part in [node, *getattr(node, "elts", ())]:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def test_nobody_asks_which_platform_this_is() -> None:
    found = [
        f"{path.relative_to(SOURCES)}:{line}: {what}"
        for path in files()
        for line, what in offences(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch_npu",
        "from openvino.runtime import Core",
        "def f():\n    import triton.language as tl",
        "import importlib\nimportlib.import_module('flash_attn')",
        "if platform.name == 'cuda': pass",
        "if 'ascend' != name: pass",
        "if device.type in ('cpu', 'meta'): pass",
        "match name:\n    case 'openvino': pass",
        "device.startswith('cuda:')",
    ],
)
def test_each_way_of_asking_is_seen(source: str) -> None:
    assert list(offences(ast.parse(source)))


def test_innocent_code_passes() -> None:
    source = "import torch\nif kind == 'full': pass\nname = 'cuda'\nd = {'cpu': 1}"
    assert list(offences(ast.parse(source))) == []
