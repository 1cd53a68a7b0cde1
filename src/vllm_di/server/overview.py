"""What fills the slots of all containers, as data: the answer of ``GET /assembly``. Whoever starts
the server makes it, since the server knows its own container alone."""

from __future__ import annotations

import msgspec


class SlotView(msgspec.Struct):
    """One slot. No value of a key is in it, so no secret."""

    slot: str
    key: str
    """The slot as an override names it: ``stages.1.attention``, or the slot's own name."""
    interface: str
    option: str
    target: str
    """Dotted name of the class."""
    chosen_by: str
    """default, platform, model, command line, auto, checkpoint, or the group that overrode it."""
    place: str
    """File and line, the override, or the reason of an automatic choice."""
    alternatives: list[str]
    """The slot's other options."""
    missing: str | None = None
    """Why the slot cannot be filled here."""


class ContainerView(msgspec.Struct):
    """One container: the server's, the engine's, or a worker's, of a stage or role."""

    name: str
    """``ServerContainer``, ``EngineContainer`` or ``WorkerContainer``."""
    part: str
    """``stages.1``, ``decode``, or nothing where there is one kind of worker."""
    slots: list[SlotView]


class Overview(msgspec.Struct):
    """The assembly of a server."""

    model: str
    platform: str
    platform_reason: str
    announcement: str
    """The platform and its level, as a start prints them."""
    interface: str
    """Version of the interfaces."""
    replicas: int
    """Engines behind the API process, each with such containers of engine and workers."""
    containers: list[ContainerView]
