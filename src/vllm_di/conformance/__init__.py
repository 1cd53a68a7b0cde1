"""The conformance suite: ordinary pytest tests that any platform can be put through, and their
report.

``vllm-di conform platform=X`` runs it. It asks for the extra ``conformance`` (pytest), but for
``report.py``, which reads and writes recorded reports with nothing beside msgspec.
"""
