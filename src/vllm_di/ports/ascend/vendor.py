"""The operators of torch-npu that this port calls, as their vendor declares them.

``npu`` operators come with CANN, ``atb`` operators with Ascend's NNAL package (Transformer Boost).
The names are those of torch-npu 2.13.0; the tests compare every line with its wheel.
"""

from __future__ import annotations

from vllm_di.components.interfaces import Device
from vllm_di.components.vendor_operators import check_operators

INSTALL = {
    "npu": "torch-npu did not register it: install the torch-npu that belongs to this torch",
    "atb": "install Ascend's NNAL package and source its set_env.sh before the start",
}

SCHEMAS: dict[str, str] = {
    "npu::npu_rms_norm": (
        "(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)"  # y, 1 / rms
    ),
    "npu::npu_add_rms_norm": (
        "(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)"
    ),
    "npu::npu_mrope": (
        "(Tensor positions, Tensor query, Tensor key, Tensor cos_sin_cache, int head_size, *, "
        "int[]? mrope_section=None, str? rotary_mode='half', str? cache_mode='default') -> "
        "(Tensor, Tensor)"
    ),
    "npu::npu_rotary_mul": (
        "(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor"
    ),
    "npu::npu_swiglu": "(Tensor self, int dim=-1) -> Tensor",
    "npu::npu_geglu": (
        "(Tensor self, int dim=-1, int approximate=1, bool activate_left=False) -> (Tensor, Tensor)"
    ),
    "npu::npu_scatter_pa_kv_cache": (
        "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor "
        "slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, Tensor? "
        "seq_lens=None, str? cache_mode='PA_NZ') -> ()"
    ),
    "npu::npu_fused_infer_attention_score": (
        "(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, Tensor? "
        "atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
        "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, "
        "Tensor? quant_scale2=None, Tensor? quant_offset2=None, Tensor? antiquant_scale=None, "
        "Tensor? antiquant_offset=None, Tensor? key_antiquant_scale=None, Tensor? "
        "key_antiquant_offset=None, Tensor? value_antiquant_scale=None, Tensor? "
        "value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, "
        "Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? "
        "value_shared_prefix=None, SymInt[]? actual_shared_prefix_len=None, Tensor? "
        "query_rope=None, Tensor? key_rope=None, Tensor? key_rope_antiquant_scale=None, int "
        "num_heads=1, float scale=1.0, int pre_tokens=2147483647, int next_tokens=2147483647, str "
        'input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, '
        "int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, int "
        "value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"
    ),
    "npu::npu_format_cast": (
        "(Tensor self, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> "
        "Tensor"
    ),
    "atb::_npu_paged_attention_v2.out": (
        "(Tensor query, Tensor key_cache, Tensor block_table, SymInt[] context_lens, *, Tensor? "
        "value_cache=None, Tensor? mask=None, int num_kv_heads=0, int num_heads=0, float "
        "scale_value=1.0, int mask_type=0, Tensor? workspace=None, Tensor(a!) out) -> Tensor(a!)"
    ),
    "atb::_npu_paged_attention_v2_get_workspace": (
        "(Tensor query, Tensor key_cache, Tensor block_table, SymInt[] context_lens, *, Tensor? "
        "value_cache=None, Tensor? mask=None, int num_kv_heads=0, int num_heads=0, float "
        "scale_value=1.0, int mask_type=0, Tensor(a!) out) -> Tensor"
    ),
}


def require(device: Device, *operators: str) -> None:
    """Raise ConfigError unless torch has these operators (``namespace::name``), and each takes the
    calls that this port was written for. ``device`` is named so that it is opened first."""
    check_operators(device, operators, SCHEMAS, missing=INSTALL, changed="torch-npu 2.13")
