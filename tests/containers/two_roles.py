"""A platform with workers of two roles, and an executor that runs both: what a user could write."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from vllm_di.components.executor.inline import InlineExecutor
from vllm_di.components.executor.multiprocess import MultiprocessExecutor
from vllm_di.components.executor.pipeline import PipelineExecutor
from vllm_di.components.interfaces import Executor, WorkerLauncher
from vllm_di.components.messages import StepPlan, StepResult, WorkerReport

ROLES = """\
# @package _global_
# Prompts on our kernels in two stages, decoding by OpenVINO.
workers:
  prefill:
    - [platform=cpu, "model.layers=[0,1]", attention=sdpa]
    - [platform=cpu, "model.layers=[1,null]"]
  decode:
    - [platform=openvino, worker.num_blocks=128]

executor:
  _target_: tests.containers.two_roles.TwoRoles

platform:
  name: two
  level: declared
"""
LINES = {"workers.decode": 7, "decode.worker.num_blocks": 8, "workers.prefill": 4}


class TwoRoles(Executor):
    """Prompts on one worker, decoding on another: it steps both, and is no more than that."""

    known_roles = ("prefill", "decode")

    def __init__(
        self, launcher: WorkerLauncher, *, processes: bool = False, step_timeout: float = 60
    ) -> None:
        prefill, decode = launcher.for_role("prefill"), launcher.for_role("decode")
        self.prefill = PipelineExecutor(
            prefill, processes=processes, depth=1, start_timeout=60, step_timeout=step_timeout
        )
        self.decode: Executor = InlineExecutor(decode)
        if processes:
            self.decode = MultiprocessExecutor(
                decode, tensor_parallel_size=1, start_timeout=60, step_timeout=step_timeout
            )

    def start(self) -> WorkerReport:
        self.prefill.start()
        return self.decode.start()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        starts = any(share.is_prefill for share in plan.scheduled)
        return (self.prefill if starts else self.decode).submit(plan)

    def collective(self, method: str, *args: Any) -> list[Any]:
        return self.prefill.collective(method, *args) + self.decode.collective(method, *args)

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()
