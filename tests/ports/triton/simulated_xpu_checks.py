"""platform=xpu on a simulated device. Run in a process of their own."""

from __future__ import annotations

from tests.ports.triton import checks


def check_tokens() -> None:
    checks.check_tokens_are_those_of_the_reference("xpu")


def check_explain() -> None:
    checks.check_explain_says_what_runs("xpu")


def check_graphs() -> None:
    checks.check_a_captured_step_may_not_wait_for_the_device("xpu")


def check_stand_ins() -> None:
    checks.check_stand_ins_are_for_the_simulated_device_alone("xpu")
