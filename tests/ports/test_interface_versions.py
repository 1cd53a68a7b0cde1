"""A port written for the minor before runs: its classes know nothing of what came since."""

from __future__ import annotations

from pathlib import Path

from tests.ports.packages import FILES, installed

from vllm_di import LLM, SamplingParams

OLD = """
from vllm_di.components.model_runner.standard import StandardModelRunner
from vllm_di.components.worker.standard import StandardWorker
from vllm_di.models.decoder import Decoder


class OldModel(Decoder):
    def forward(self, token_ids, positions, caches, metadata):
        return super().forward(token_ids, positions, caches, metadata)


class OldRunner(StandardModelRunner):
    def execute(self, plan):
        return super().execute(plan)


class OldWorker(StandardWorker):
    def execute(self, plan):
        return super().execute(plan)
"""
ASKED = ["platform=mychip", "model=tiny", "model.dtype=float32"]
CLASSES = {"model": "OldModel", "model_runner": "OldRunner", "worker": "OldWorker"}


def tokens(*overrides: str) -> list[int]:
    with LLM(overrides=[*ASKED, *overrides]) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        return llm.generate("hello", params)[0].outputs[0].token_ids


def test_interfaces_1_0_are_served(tmp_path: Path) -> None:
    """``Model.forward``, ``ModelRunner.execute`` and ``Worker.execute`` took no hidden states."""
    with installed(tmp_path, FILES | {"mychip/old.py": OLD}):
        old = [f"{slot}._target_=mychip.old.{name}" for slot, name in CLASSES.items()]
        assert tokens(*old) == tokens()
