"""Importing this changes a class of the engine and starts a thread."""

import threading

from vllm_di.components import interfaces
from vllm_di.components.attention.paged import PagedAttention

interfaces.Device.synchronize = lambda self: None  # type: ignore[method-assign]
threading.Thread(target=threading.Event().wait, args=(5,), daemon=True, name="rude").start()


class RudePatch(PagedAttention): ...
