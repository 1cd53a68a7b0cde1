"""The parts of a worker without a checkpoint, a model or an engine: attention, KV layout, ops,
sampler, communicator, quantization, device. For another engine that builds on them.

    chosen = assemble_parts([("attention=sdpa", "env DI_CONFIG")], platform="cpu")
    with open_parts(chosen, dtype="bfloat16") as parts:
        parts.attention.build(plan)

``assemble_parts`` needs no torch; its result is plain data that crosses processes
(``Assembly.encode``). Nothing is kept between calls: several may be open at once in one process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_di.components.interfaces import (
    AttentionBackend,
    Communicator,
    Device,
    KvLayout,
    LayerCache,
    OpTable,
    Placement,
    Quantization,
    Sampler,
    SchedulerLimits,
)
from vllm_di.components.messages import KvSpec
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.explain import Row, rows
from vllm_di.containers.fill import opened
from vllm_di.containers.origins import Origin
from vllm_di.containers.overrides import read
from vllm_di.containers.slots import SLOTS, WorkerContainer
from vllm_di.containers.stages import has_stages
from vllm_di.containers.tree import ConfigFiles
from vllm_di.containers.trial import try_parts
from vllm_di.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

PARTS = (
    "device",
    "communicator",
    "ops",
    "kv_layout",
    "attention",
    "limits",
    "quantization",
    "sampler",
)
"""Slots of the worker that need no model."""
Override = str | tuple[str, str]
"""``attention=sdpa``, or with where it was read: (``attention=sdpa``, ``env DI_CONFIG``)."""


class Parts:
    """What ``open_parts`` has built. A part that was not asked for raises ConfigError."""

    device: Device
    communicator: Communicator
    ops: OpTable
    kv_layout: KvLayout
    attention: AttentionBackend
    limits: SchedulerLimits
    quantization: Quantization
    sampler: Sampler

    def __init__(
        self,
        built: Mapping[str, Any],
        assembly: Assembly,
        dtype: torch.dtype,
        specs: Sequence[KvSpec],
    ) -> None:
        for name, part in built.items():
            setattr(self, name, part)
        self.assembly, self.dtype, self.specs = assembly, dtype, list(specs)

    def __getattr__(self, name: str) -> Any:
        if name not in PARTS:
            raise AttributeError(name)
        raise ConfigError(f"{name} was not asked for: add it to `only` of open_parts")

    def allocate(self, num_blocks: int) -> list[LayerCache]:
        """A zeroed KV cache of the layout, one entry for each of ``specs``."""
        return self.kv_layout.allocate(self.specs, num_blocks, self.dtype)


def assemble_parts(
    overrides: Sequence[Override] = (),
    *,
    platform: str | None = None,
    config_dirs: Iterable[str | Path] = (),
    origin: str = "assemble_parts",
) -> Assembly:
    """Choose the parts. Errors and ``explain_parts`` name the origin of each override, which is
    ``origin`` where it has none of its own; it counts as the command line does. ``platform`` stands
    before the overrides. Imports no component and reads no checkpoint. Raises ConfigError for what
    is wrong, and for a slot that is not one of ``PARTS``."""
    tree = ConfigFiles.find(folders := list(config_dirs))
    texts: list[str] = []
    sources: dict[str, Origin] = {}
    for override in [*([f"platform={platform}"] if platform else []), *overrides]:
        text, read_from = (override, origin) if isinstance(override, str) else override
        texts.append(text)
        sources[text] = Origin(read_from, text=text, named=True)
        slot = read(text).slot
        if slot in SLOTS and slot not in PARTS:
            raise ConfigError(
                f"{read_from}: {text!r}: {slot} is not one of the parts, which are "
                f"{', '.join(PARTS)}{nearest(slot, PARTS)}"
            )
        if read(text).key == "platform" and has_stages(tree, read(text).value):
            raise ConfigError(f"{sources[text]}: it has stages; name a platform without")
    return assemble(["model=tiny", *texts], folders, sources=sources)


@contextmanager
def open_parts(
    assembly: Assembly,
    *,
    dtype: torch.dtype | str = "auto",
    specs: Sequence[KvSpec] = (),
    placement: Placement | None = None,
    only: Collection[str] = (),
    **objects: Any,
) -> Iterator[Parts]:
    """Build the parts, or ``only`` some and what they need, and close them at the end of the block.

    ``dtype``: of activations and cache; "auto" is the device's. ``specs``: what each layer keeps of
    a token, for ``Parts.allocate``. A port's ops and attention are tried on a small input of that
    dtype and the first of these shapes. Keyword ``objects`` stand in for components. Raises
    ConfigError, before anything is built where the config is wrong.
    """
    names = tuple(only) or PARTS
    for name in names:
        if name not in PARTS:
            raise ConfigError(
                f"only: no part {name!r}; there are {', '.join(PARTS)}{nearest(name, PARTS)}"
            )
    with opened(
        WorkerContainer,
        assembly,
        only=["device", *names],
        placement=placement or Placement(),
        **objects,
    ) as container:
        device = container.device()
        if isinstance(dtype, str):
            chosen = device.default_dtype if dtype == "auto" else device.dtype(dtype)
        else:
            chosen = dtype
        providers = {name: container.providers[name] for name in PARTS}
        built = {name: p() for name, p in providers.items() if p.overridden}
        parts = Parts(built, assembly, chosen, specs)
        if "attention" in built and "kv_layout" in built:
            _check_layout(parts)
        if not objects:
            try_parts(container, assembly, built, chosen, specs)
        yield parts


def explain_parts(assembly: Assembly, config_dirs: Iterable[str | Path] = ()) -> list[Row]:
    """What fills each part, who chose it and where. Raises ConfigError as ``open_parts`` would for
    a wrong config; builds nothing."""
    return rows(assembly, PARTS, config_dirs)


def _check_layout(parts: Parts) -> None:
    attention, layout = parts.attention, parts.kv_layout
    if "*" not in attention.layouts and layout.name not in attention.layouts:
        raise ConfigError(
            f"{parts.assembly.place('attention._target_')}: {type(attention).__name__} cannot read "
            f"the KV layout {layout.name!r}; it reads {', '.join(attention.layouts)}"
        )
