"""vllm-di: an LLM serving engine whose every hardware decision is a named slot, filled from
YAML."""

__version__ = "0.1.0"
