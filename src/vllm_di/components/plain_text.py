"""What the parsers named ``none`` do with text."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_di.components.interfaces import ContentDelta, ParserEvent, ParserState


class PlainText(ParserState):
    """All text is content, and nothing is held back."""

    def feed(self, delta: str) -> Sequence[ParserEvent]:
        return (ContentDelta(delta),)

    def finish(self) -> Sequence[ParserEvent]:
        return ()
