"""All that is to be run on a machine with an NVIDIA GPU, in one call of a few minutes.

    python -m benchmarks.gpu --budget 540 --json gpu.json

The kernels against the reference, the port's tests, the conformance suite, then rates: of each
kernel, and of decode and prefill at Llama-3-8B shapes. Each part has a time limit of its own and
runs in processes of its own; what is known is written after each.
"""
