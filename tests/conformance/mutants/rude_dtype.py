"""Importing this changes torch's default dtype."""

import torch

from vllm_di.components.attention.paged import PagedAttention

torch.set_default_dtype(torch.float16)


class RudeDtype(PagedAttention): ...
