"""The port's calls against the vendor's own schemas and meta kernels, read from its wheel. Run in a
process of their own: this defines the vendor's operators for real."""

from __future__ import annotations

import re
import sys
import types
from functools import cache

import pytest
import torch
import yaml
from tests.ports.wheels import TORCH_NPU
from torch import Tensor
from torch.library import Library

from vllm_di.components.interfaces import AttentionSpec, LayerCache
from vllm_di.components.kv_layout.nhd import NhdLayout
from vllm_di.components.ops.torch import TorchOps
from vllm_di.errors import ConfigError
from vllm_di.ports.ascend import vendor
from vllm_di.ports.ascend.attention import AscendAttention, Metadata
from vllm_di.ports.ascend.ops import AscendOps
from vllm_di.ports.ascend.weights import NzWeights

META = torch.device("meta")
_kept: list[object] = []


class Stub(types.ModuleType):
    """Stands for a module that needs the vendor's runtime; unknown attributes are numbers."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return hash(name) % 1000 + 1000


class MetaDevice:
    torch_device = META
    supported_dtypes = (torch.bfloat16, torch.float16)


@cache
def yaml_schemas() -> dict[str, str]:
    """Operator with overload to schema, of all that the wheel's generator makes."""
    text = TORCH_NPU.read("torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml")
    found = {}
    for row in yaml.safe_load(text)["custom"]:
        schema = row["func"] if isinstance(row, dict) else row
        found[f"npu::{schema.partition('(')[0].strip()}"] = f"npu::{schema}"
    return found


@cache
def atb_schemas() -> dict[str, str]:
    """Those that the Transformer Boost library carries as whole strings."""
    data = TORCH_NPU.read("torch_npu/lib/libop_plugin_atb.so")
    strings = re.findall(rb"[ -~]{16,}", data)
    rows = [s.decode() for s in strings if re.match(rb"_?npu_\w+(\.\w+)?\(Tensor .*\) -> ", s)]
    return {f"atb::{row.partition('(')[0]}": f"atb::{row}" for row in rows}


@cache
def define_all() -> int:
    """Every schema and meta kernel of the wheel into torch; the number of schemas."""
    schemas = yaml_schemas() | {
        name: atb_schemas()[name] for name in vendor.SCHEMAS if "atb" in name
    }
    for schema in schemas.values():
        namespace, _, rest = schema.partition("::")
        library = Library(namespace, "FRAGMENT")
        library.define(rest)
        _kept.append(library)
    atb = Library("atb", "IMPL", "Meta")
    # the wheel has no meta kernels for these two: `out` is what they fill
    atb.impl("_npu_paged_attention_v2.out", lambda *given, out, **named: out)
    atb.impl("_npu_paged_attention_v2_get_workspace", lambda *given, out, **named: out.new_empty(0))
    _kept.append(atb)
    names = ("", "._C", ".utils", ".utils._error_code", ".npu", ".npu.utils", ".npu._backends")
    modules = {f"torch_npu{name}": Stub(f"torch_npu{name}") for name in names}
    errors = modules["torch_npu.utils._error_code"]
    errors.ErrCode, errors.ops_error = Stub("ErrCode"), lambda code: ""  # type: ignore[attr-defined]
    modules["torch_npu.npu.utils"].get_cann_version = lambda: "8.5.0"  # type: ignore[attr-defined]
    modules["torch_npu.npu._backends"].get_soc_version = lambda: 223  # type: ignore[attr-defined]
    modules["torch_npu"].npu = modules["torch_npu.npu"]  # type: ignore[attr-defined]
    sys.modules.update(modules)
    source = TORCH_NPU.read("torch_npu/op_plugin/meta/_meta_registrations.py")
    namespace_of_file: dict[str, object] = {"__name__": "vendor_meta"}
    exec(compile(source, "_meta_registrations.py", "exec"), namespace_of_file)
    _kept.append(namespace_of_file)
    return len(schemas)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def device() -> MetaDevice:
    define_all()
    return MetaDevice()


def check_the_ports_schemas_are_the_vendors() -> None:
    theirs = yaml_schemas() | atb_schemas()
    for name, ours in vendor.SCHEMAS.items():
        parse = torch._C.parse_schema
        assert str(parse(name + ours)) == str(parse(theirs[name])), name


def check_all_of_the_vendors_schemas_are_defined() -> None:
    assert define_all() == len(yaml_schemas()) + 2 and len(yaml_schemas()) > 400


def check_ops_give_the_vendors_shapes() -> None:
    ops, reference = AscendOps(device()), TorchOps()  # type: ignore[arg-type]
    for tokens in (0, 1, 7):
        x, weight = meta(tokens, 64), meta(64)
        same(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
        pair = ops.add_rms_norm(x, x, weight, 1e-5)
        for ours, theirs in zip(pair, reference.add_rms_norm(x, x, weight, 1e-5), strict=True):
            same(ours, theirs)
        same(ops.silu_and_mul(x), reference.silu_and_mul(x))
        same(ops.gelu_tanh_and_mul(x), reference.gelu_tanh_and_mul(x))
        q, k = meta(tokens, 4, 16), meta(tokens, 2, 16)
        positions = meta(tokens, dtype=torch.int64)
        for size, interleaved in ((16, False), (16, True), (12, False), (12, True)):
            table = meta(32, size, dtype=torch.float32)
            new_q, new_k = ops.rotary_embedding(positions, q, k, table, interleaved)
            same(new_q, q)
            same(new_k, k)


def check_attention_calls() -> None:
    layout = NhdLayout(device(), block_size=128, dtype="auto")  # type: ignore[arg-type]
    attention = AscendAttention(device(), layout)  # type: ignore[arg-type]
    for head_size in (64, 128):
        spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=head_size, scale=0.1)
        for queries in ([5], [1, 1, 1], [3, 1, 4, 1]):
            tokens, seqs = sum(queries), len(queries)
            mixed = len(set(queries)) > 1
            decodes = [i for i, count in enumerate(queries) if count == 1]
            m = Metadata(
                written=None,
                slots=meta(tokens, dtype=torch.int32),
                block_table=meta(seqs, 3, dtype=torch.int32),
                lengths=[count + 100 for count in queries],
                ends=[sum(queries[: i + 1]) for i in range(seqs)],
                prefills=[i for i, count in enumerate(queries) if count > 1],
                decodes=decodes,
                decode_rows=meta(len(decodes), dtype=torch.int64) if mixed else None,
                decode_blocks=meta(len(decodes), 3, dtype=torch.int32) if mixed else None,
            )
            cache = LayerCache((meta(9, 128, 2, head_size), meta(9, 128, 2, head_size)))
            q, k = meta(tokens, 8, head_size), meta(tokens, 2, head_size)
            same(attention.forward(q, k, k, cache, m, spec), q)


def check_weights_are_cast_by_a_known_call() -> None:
    weights = NzWeights(device(), TorchOps())  # type: ignore[arg-type]
    # the wheel has no meta kernel for the cast: the call must get past the schema, to the kernel
    with pytest.raises(NotImplementedError, match="npu_format_cast"):
        weights.linear(meta(32, 16), None)


def check_a_changed_or_missing_operator_is_refused() -> None:
    d = device()
    kept = dict(vendor.SCHEMAS)
    try:
        vendor.SCHEMAS["npu::npu_swiglu"] = "(Tensor self, Tensor other, int dim=-1) -> Tensor"
        vendor.SCHEMAS["npu::npu_no_such"] = "(Tensor self) -> Tensor"
        vendor.SCHEMAS["atb::_npu_no_such"] = "(Tensor self) -> Tensor"
        for name, text in (
            ("npu::npu_swiglu", "has changed"),
            ("npu::npu_no_such", "install the torch-npu"),
            ("atb::_npu_no_such", "install Ascend's NNAL"),
        ):
            with pytest.raises(ConfigError, match=text):
                vendor.require(d, name)  # type: ignore[arg-type]
    finally:
        vendor.SCHEMAS.clear()
        vendor.SCHEMAS.update(kept)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (ours.shape, theirs.shape)
