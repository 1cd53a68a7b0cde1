"""platform=rocm on a simulated device. Run in a process of their own."""

from __future__ import annotations

from tests.ports.triton import checks


def check_tokens() -> None:
    checks.check_tokens_are_those_of_the_reference("rocm")


def check_explain() -> None:
    checks.check_explain_says_what_runs("rocm")


def check_graphs() -> None:
    checks.check_a_captured_step_may_not_wait_for_the_device("rocm")
