"""What a test of the suite can say beside pass and fail."""

from __future__ import annotations

from typing import Any


class NotDeclared(Exception):
    """The platform does not claim what the test would judge. Carries why."""


class NotRun(Exception):
    """A driver or a download is absent, so that the test could not run. Lowers the level."""


class Record:
    """What a test tells the report about itself."""

    def __init__(self) -> None:
        self.features: list[str] = []
        self.figures: dict[str, Any] = {}

    def feature(self, name: str) -> None:
        """This test speaks for a row of the support matrix."""
        self.features.append(name)

    def figure(self, **values: Any) -> None:
        """Something measured or counted, by name."""
        self.figures |= values
