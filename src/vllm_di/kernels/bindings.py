"""The compiled kernels as Python callables."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}


class CpuKernels:
    """One attribute for each exported function of ``cpu/*.cpp``, which say what the arguments are.
    A call releases the interpreter's lock.

    A signature has one letter an argument: pointer, int, long (64 bits), float.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        def bind(name: str, signature: str, returns: Any = None) -> Kernel:
            function = getattr(library, name)
            function.argtypes, function.restype = [TYPES[letter] for letter in signature], returns
            kernel: Kernel = function
            return kernel

        self.rms_norm = bind("rms_norm", "ippplllllfi")
        self.add_rms_norm = bind("add_rms_norm", "ippppllfi")
        self.rotary_embedding = bind("rotary_embedding", "ipppplllllllii")
        self.gate_and_mul = bind("gate_and_mul", "iippllli")
        self.write_kv = bind("write_kv", "lppppplllllli")
        self.rotary_write_kv = bind("rotary_write_kv", "ipppppppplllllllllii")
        self.argmax = bind("argmax", "ppllli")
        self.pack_linear = bind("pack_linear", "ppllli")
        self.linear = bind("linear", "ippppilllliiii")
        self.has_tiles = bind("has_tiles", "", ctypes.c_int)
        self.paged_attention = bind("paged_attention", "ipppppppllllllllfflii")
        self.top_k_top_p_sample = bind("top_k_top_p_sample", "ppppppllli")
        self.embedding = bind("embedding", "ppplli")
        self.packed_rows = bind("packed_rows", "ppplli")
        self.group_rows = bind("group_rows", "iippplli")
        self.pack_channels = bind("pack_channels", "pplli")
        self.pack_groups = bind("pack_groups", "ipppplli")
        self.quantized_linear = bind("quantized_linear", "iipppppilllliiii")
        self.fused_experts = bind("fused_experts", "ipppppplllllllii")
        self.tape_start = bind("tape_start", "", ctypes.c_void_p)
        self.tape_stop = bind("tape_stop", "")
        self.tape_replay = bind("tape_replay", "pi")
        self.tape_free = bind("tape_free", "p")


class GroupKernels:
    """Collectives of ``cpu/group.cpp`` over shared memory; the first argument is what ``open``
    gave. They return 0, or a trouble's kind << 16 | the rank."""

    def __init__(self, library: ctypes.CDLL) -> None:
        def bind(name: str, signature: str, returns: Any = ctypes.c_int) -> Kernel:
            function = getattr(library, f"group_{name}")
            function.argtypes, function.restype = [TYPES[letter] for letter in signature], returns
            kernel: Kernel = function
            return kernel

        self.bytes = bind("bytes", "il", ctypes.c_int64)
        self.open = bind("open", "iiilllp", ctypes.c_void_p)
        self.close = bind("close", "p", None)
        self.all_reduce = bind("all_reduce", "pippl")
        self.all_gather = bind("all_gather", "pppll")
