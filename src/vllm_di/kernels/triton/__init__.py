"""Kernels in Triton: the same sources for NVIDIA, AMD and Intel GPUs. They know pointers, strides
and sizes; ``components/ops/triton.py`` launches them."""
