"""Kernels of Intel's package vllm-xpu-kernels. The port's own are in ``kernels/triton``."""
