"""From measured steps to the time of any step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.simulation.made_up import DECODE, ROW, times

from vllm_di.components.messages import KvGroup, ScheduledSequence, StepPlan
from vllm_di.errors import ConfigError
from vllm_di.simulation.curve import Curve
from vllm_di.simulation.shapes import Shaper, StepShape
from vllm_di.simulation.step_times import MeasuredStep, StepTimes


def test_a_curve_is_exact_where_time_is_linear_between_knots() -> None:
    def truth(rows: int, context: float) -> float:
        return 2e-3 + 1e-4 * min(rows, 16) + 3e-5 * max(0, rows - 16) + 1e-7 * context

    draw = random.Random(0)
    rows = [1, 2, 4, 8, 16, 32, 64] * 4
    others = [[draw.uniform(0, 1e4)] for _ in rows]
    curve = Curve(rows, others, [truth(n, c) for n, (c,) in zip(rows, others, strict=True)])
    for n in (1, 3, 10, 16, 40, 64):
        assert curve.seconds(n, (500.0,)) == pytest.approx(truth(n, 500.0), rel=1e-3)
    assert curve.seconds(128, (0.0,)) == pytest.approx(truth(128, 0.0), rel=1e-3)


def test_a_disturbed_step_moves_the_fit_little() -> None:
    rows, seconds = [1, 2, 4, 8] * 5, [1e-3] * 20
    seconds[5] = 0.5
    curve = Curve(rows, [[0.0]] * 20, seconds)
    assert curve.seconds(2, (0.0,)) == pytest.approx(1e-3, rel=1e-2)


def test_more_work_takes_no_less_time() -> None:
    """Noise that says otherwise is no slope."""
    rows, contexts = [4] * 10, [[float(i)] for i in range(10)]
    curve = Curve(rows, contexts, [1e-3 - 1e-5 * i for i in range(10)])
    assert curve.slopes == [0.0]


def test_a_curve_of_one_number_of_rows() -> None:
    curve = Curve([8, 8], [[0.0], [0.0]], [4e-3, 4e-3])
    assert curve.seconds(8, (0.0,)) == pytest.approx(4e-3)
    assert curve.seconds(16, (0.0,)) == pytest.approx(8e-3)


def _share(seq_id: int, start: int, count: int, *, prompt: bool) -> ScheduledSequence:
    return ScheduledSequence(seq_id, start, count, [[]], [], True, prompt)


def test_shapes_count_what_is_seen() -> None:
    plan = StepPlan(
        1,
        [],
        [
            _share(1, 99, 1, prompt=False),
            _share(2, 9, 1, prompt=False),
            _share(3, 50, 20, prompt=True),
        ],
        [],
    )
    shape = Shaper([KvGroup([0, 1])]).shape(plan)
    assert shape == StepShape(2, 110.0, 1, 20, sum(range(51, 71)))
    assert shape.rows == 22
    windows = Shaper([KvGroup([0, 1, 2]), KvGroup([3], 16)]).shape(plan)
    assert windows.context == pytest.approx(0.75 * 110 + 0.25 * (16 + 10))
    assert windows.pairs == pytest.approx(0.75 * sum(range(51, 71)) + 0.25 * 20 * 16)


def test_times_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    times().write(path)
    found = StepTimes.read(path)
    assert found == times()
    model = found.model_of_time()
    assert model.seconds(StepShape(3, 30.0, 0, 0, 0.0)) == pytest.approx(DECODE)
    assert model.seconds(StepShape(0, 0.0, 2, 100, 100.0)) == pytest.approx(100 * ROW)


def test_the_error_is_that_of_steps_that_were_kept_apart() -> None:
    made_up = times()
    assert made_up.error() is None
    shape = StepShape(2, 100.0, 0, 0, 0.0)
    made_up.steps.extend(
        MeasuredStep(shape, seconds, False) for seconds in (DECODE / 0.8, DECODE, DECODE)
    )
    error = made_up.error()
    assert error is not None
    assert error.num_steps == 3
    assert error.median == pytest.approx(0.0, abs=1e-6)
    assert error.p90 == pytest.approx(0.2)
    assert error.total == pytest.approx(3 / 3.25 - 1)


def test_what_lies_beyond() -> None:
    model = times().model_of_time()
    assert model.beyond(StepShape(64, 64.0, 0, 0, 0.0)) is None
    assert model.beyond(StepShape(65, 65.0, 0, 0, 0.0)) == "decodes"
    assert model.beyond(StepShape(1, 2001.0, 0, 0, 0.0)) == "context"
    assert model.beyond(StepShape(1, 1.0, 1, 512, 0.0)) == "tokens"
    assert model.beyond(StepShape(0, 0.0, 1, 2, 4002.0)) == "keys"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file of step times"),
        ("[]", "no file of step times"),
        ('{"format": 2}', "no file of step times"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "steps.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"steps\.json: {message}.*simulate measure"):
        StepTimes.read(path)


def test_too_few_steps_make_no_fit(tmp_path: Path) -> None:
    few = times()
    few.steps[:] = [step for step in few.steps if not step.shape.prompts]
    few.write(tmp_path / "steps.json")
    with pytest.raises(ConfigError, match=r"steps\.json: fewer than 8 steps with prompts"):
        StepTimes.read(tmp_path / "steps.json")
