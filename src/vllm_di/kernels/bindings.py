"""The compiled kernels as Python callables."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

Kernel = Callable[..., None]
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}


class CpuKernels:
    """One attribute for each exported function of ``cpu/*.cpp``, which say what the arguments are.
    A call releases the interpreter's lock.

    A signature has one letter an argument: pointer, int, long (64 bits), float.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        def bind(name: str, signature: str) -> Kernel:
            function = getattr(library, name)
            function.argtypes, function.restype = [TYPES[letter] for letter in signature], None
            kernel: Kernel = function
            return kernel

        self.rms_norm = bind("rms_norm", "ippplllllfi")
        self.add_rms_norm = bind("add_rms_norm", "ippppllfi")
        self.rotary_embedding = bind("rotary_embedding", "ipppplllllllii")
        self.gate_and_mul = bind("gate_and_mul", "iippllli")
        self.write_kv = bind("write_kv", "lpppppllllll")
        self.argmax = bind("argmax", "ppllli")
        self.pack_linear = bind("pack_linear", "ppllli")
        self.linear = bind("linear", "ippppillllii")
        self.paged_attention = bind("paged_attention", "ipppppppllllllllffli")
        self.top_k_top_p_sample = bind("top_k_top_p_sample", "ppppppllli")
