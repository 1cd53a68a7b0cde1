"""Attention of other packages on NVIDIA GPUs. The port's own kernels are in ``kernels/triton``."""
