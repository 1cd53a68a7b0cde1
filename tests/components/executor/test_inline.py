"""The future of a step that has run in this process."""

from __future__ import annotations

from concurrent.futures import Future, wait

import pytest

from vllm_di.components.executor.inline import Done
from vllm_di.components.messages import StepResult

RESULT = StepResult(7, [])


def test_a_done_future_is_a_whole_one_for_whoever_asks() -> None:
    assert Done(RESULT).result() is RESULT
    assert "_condition" not in vars(Done(RESULT))  # no lock was made
    assert wait([Done(RESULT)], timeout=0).not_done == set()
    assert Done(RESULT).done()
    assert not Done(RESULT).cancel()
    assert Done(RESULT).exception() is None
    assert "finished" in repr(Done(RESULT))
    seen: list[Future[StepResult]] = []
    future = Done(RESULT)
    future.add_done_callback(seen.append)
    assert seen == [future]
    with pytest.raises(AttributeError, match="no_such"):
        future.no_such  # noqa: B018
