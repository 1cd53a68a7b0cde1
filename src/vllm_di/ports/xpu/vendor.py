"""The operators of vllm-xpu-kernels that this port calls, as the package declares them.

The names are those of 0.1.16.2; the tests compare every line with its wheel.
"""

from __future__ import annotations

import importlib

from vllm_di.components.interfaces import Device
from vllm_di.components.vendor_operators import check_operators
from vllm_di.errors import PortError

PACKAGE = "vllm_xpu_kernels"
INSTALL = "pip install vllm-xpu-kernels, into the XPU build of torch that it was made for"

SCHEMAS: dict[str, str] = {
    "_C::rms_norm": "(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
    "_C::fused_add_rms_norm": (
        "(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()"
    ),
    "_C::silu_and_mul": "(Tensor! result, Tensor input) -> ()",
    "_C::gelu_tanh_and_mul": "(Tensor! out, Tensor input) -> ()",
    "_C::rotary_embedding": (
        "(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
        "bool is_neox) -> ()"
    ),
    "_C::fused_qk_norm_rope": (
        "(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, "
        "Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor "
        "position_ids, int forced_token_heads_per_warp=-1) -> ()"
    ),
}


def load(device: Device, *, simulated: bool) -> None:
    """Have the package register its operators; a simulated device has stand-ins already. Raises
    PortError where it is absent, ConfigError where an operator is missing or has changed."""
    if not simulated:
        try:
            importlib.import_module(f"{PACKAGE}._C")
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == PACKAGE
            why = "is not installed" if absent else f"cannot be imported: {error}"
            raise PortError(f"ops=xpu_kernels: the package {PACKAGE} {why}; {INSTALL}") from error
    check_operators(
        device,
        [*SCHEMAS],
        SCHEMAS,
        missing={"_C": f"{PACKAGE} did not register it: {INSTALL}"},
        changed="vllm-xpu-kernels 0.1.16",
    )
