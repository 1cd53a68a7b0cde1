"""The three containers, one for each kind of process. A slot is a name and an interface, and
nothing else is here.

``fill.py`` gives each slot a provider from the YAML node of the same name. *Given* values come from
the process that opens the container; a *derived* one is what a method of another slot returned.
"""

from typing import Any

from dependency_injector.containers import DeclarativeContainer
from dependency_injector.providers import Dependency

from vllm_di.components import interfaces as i
from vllm_di.components.messages import WorkerReport


class ServerContainer(DeclarativeContainer):
    """The API process: text in, text out. It imports neither torch nor transformers."""

    tokenizer = Dependency(instance_of=i.Tokenizer)
    chat_template = Dependency(instance_of=i.ChatTemplate)
    tool_parser = Dependency(instance_of=i.ToolParser)
    reasoning_parser = Dependency(instance_of=i.ReasoningParser)
    router = Dependency(instance_of=i.Router)
    metrics = Dependency(instance_of=i.Metrics)
    tracing = Dependency(instance_of=i.Tracing)
    server = Dependency(instance_of=i.Server)
    # given
    engine_client = Dependency(instance_of=i.EngineClient)


class EngineContainer(DeclarativeContainer):
    """The engine process: token ids in, token ids out."""

    executor = Dependency(instance_of=i.Executor)
    kv_cache_manager = Dependency(instance_of=i.KvCacheManager)
    kv_transfer = Dependency(instance_of=i.KvTransfer)
    structured_output = Dependency(instance_of=i.StructuredOutput)
    drafter = Dependency(instance_of=i.Drafter)
    scheduler = Dependency(instance_of=i.Scheduler)
    engine = Dependency(instance_of=i.Engine)
    # given
    launcher = Dependency(instance_of=i.WorkerLauncher)
    # derived: executor.start()
    worker_report = Dependency(instance_of=WorkerReport)


class WorkerContainer(DeclarativeContainer):
    """One rank of the model."""

    device = Dependency(instance_of=i.Device)
    communicator = Dependency(instance_of=i.Communicator)
    ops = Dependency(instance_of=i.OpTable)
    kv_layout = Dependency(instance_of=i.KvLayout)
    attention = Dependency(instance_of=i.AttentionBackend)
    limits = Dependency(instance_of=i.SchedulerLimits)
    quantization = Dependency(instance_of=i.Quantization)
    loader = Dependency(instance_of=i.Loader)
    model = Dependency(instance_of=i.Model)
    graph = Dependency(instance_of=i.GraphPolicy)
    shapes = Dependency(instance_of=i.ShapePolicy)
    program = Dependency(instance_of=i.ModelProgram)
    sampler = Dependency(instance_of=i.Sampler)
    pooler = Dependency(instance_of=i.Pooler)
    model_runner = Dependency(instance_of=i.ModelRunner)
    worker = Dependency(instance_of=i.Worker)
    # shared with the engine: built here too, where a part asks for it
    kv_transfer = Dependency(instance_of=i.KvTransfer)
    structured_output = Dependency(instance_of=i.StructuredOutput)
    # given
    placement = Dependency(instance_of=i.Placement)


Container = type[DeclarativeContainer]

GIVEN: dict[Container, tuple[str, ...]] = {
    ServerContainer: ("engine_client",),
    EngineContainer: ("launcher",),
    WorkerContainer: ("placement",),
}
"""Values that are passed in by whoever opens a container."""

DERIVED: dict[Container, dict[str, tuple[str, str]]] = {
    EngineContainer: {"worker_report": ("executor", "start")}
}
"""Slots that hold what a method of another slot returned."""

SHARED: dict[Container, dict[str, Container]] = {
    WorkerContainer: {"kv_transfer": EngineContainer, "structured_output": EngineContainer}
}
"""Slots of another container, whose node fills them here as well: one choice for both."""


def slots(container: Container) -> dict[str, type]:
    """Slot name to interface, for the slots that a YAML node fills."""
    apart = {*GIVEN[container], *DERIVED.get(container, {}), *SHARED.get(container, {})}
    providers: dict[str, Any] = container.providers
    return {n: p.instance_of for n, p in providers.items() if n not in apart}


SLOTS = {name: kind for c in GIVEN for name, kind in slots(c).items()}
"""All slots of all containers. Names are unique."""
