"""A method that a worker's own class declares, called through every executor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from tests.components.executor.test_multiprocess import FakeWorker, Script
from tests.components.executor.test_multiprocess import executor as multiprocess

from vllm_di.components.executor.inline import InlineExecutor
from vllm_di.components.executor.pipeline import PipelineExecutor
from vllm_di.components.interfaces import Executor, Placement, Worker
from vllm_di.components.messages import CacheSize, KvGroup, StepPlan
from vllm_di.components.remote import RemoteMethods, remote
from vllm_di.components.worker.standard import StandardWorker
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import Launcher
from vllm_di.errors import ConfigError, PortError, RequestError


class Roomy(FakeWorker):
    """All stages have the same room."""

    def prepare(self, groups: list[KvGroup]) -> CacheSize:
        return CacheSize(19, 8)


class Local(Script):
    """Workers in this process."""

    def __init__(self, folder: Path, num_stages: int) -> None:
        super().__init__(folder, "works")
        self.num_stages = num_stages

    @contextmanager
    def _opened(self, stage: int) -> Iterator[Worker]:
        yield Roomy(stage, self.how)

    def open(self, placement: Placement) -> AbstractContextManager[Worker]:
        return self._opened(placement.stage)


def opened(kind: str, folder: Path) -> Executor:
    if kind == "inline":
        return InlineExecutor(Local(folder, 1))
    if kind == "multiprocess":
        return multiprocess(folder, "works")
    return PipelineExecutor(
        Local(folder, 2), processes=False, depth=None, start_timeout=20, step_timeout=20
    )


@pytest.mark.parametrize("kind", ["inline", "multiprocess", "pipeline"])
def test_a_method_of_its_own_is_called_and_checked(kind: str, tmp_path: Path) -> None:
    running = opened(kind, tmp_path)
    try:
        running.start()
        want = [20.5] if kind == "inline" else [20.5, 21.5]
        assert running.collective("temperature", "C") == want
        with pytest.raises(ConfigError, match=r"no method 'close'; it has load.*temperature"):
            running.collective("close")
        with pytest.raises(RequestError, match=r"temperature\.unit: Expected `str`, got `int`"):
            running.collective("temperature", 3)
        with pytest.raises(RequestError, match=r"temperature\(unit: .*missing .*: 'unit'"):
            running.collective("temperature")
        with pytest.raises(RequestError, match="too many positional arguments"):
            running.collective("temperature", "C", 1)
        with pytest.raises(RequestError, match="no such unit"):
            running.collective("temperature", "furlong")
        with pytest.raises(
            PortError,
            match="returned something else than it declares",
        ):
            running.collective("temperature", "K")
        assert running.collective("temperature", "C") == want  # none of it hurt a worker
        if kind == "multiprocess":
            assert running.submit(StepPlan(7, [], [], [])).result(20).step == 7
    finally:
        running.close()


def test_what_is_no_plain_data_cannot_be_declared() -> None:
    class Leaky(FakeWorker):
        @remote
        def device(self, path: list[Path]) -> int:
            return 0

    with pytest.raises(PortError, match="its parameter path holds a Path, which is not plain data"):
        RemoteMethods(Leaky)


def test_the_class_is_that_of_the_assembly() -> None:
    found = assemble(["platform=cpu", "model=tiny"])
    assert Launcher(found).worker_class(0) is StandardWorker
