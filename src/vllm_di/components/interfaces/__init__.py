"""Every interface of the engine, and the in-process values that cross them.

One page for each reader: ``device``, ``ops``, ``attention``, ``model`` and ``worker`` for a port's
author, ``engine`` for scheduling, ``server`` for what clients see. Import the names from here.

A slot of a container (``containers/slots.py``) is filled by one class that implements one
interface here. What crosses a *process* boundary is in ``messages.py``. Importing this page costs
nothing: torch is named in annotations only.

Conventions: ``num_`` counts, sizes are in elements unless the name says ``bytes``, shapes stand in
brackets, ``rank`` counts from 0. A constructor parameter that bears a slot's name is injected;
every other one is a key of the YAML node.
"""

from vllm_di.components.interfaces.attention import (
    AttentionBackend,
    AttentionSpec,
    BatchPlan,
    CacheTensor,
    GroupTables,
    KvLayout,
    LayerCache,
    PlanShape,
    TracedCache,
    UnrotatedForward,
    fixed,
)
from vllm_di.components.interfaces.device import (
    DEFAULT_ROLE,
    Communicator,
    Device,
    DeviceMemory,
    Placement,
)
from vllm_di.components.interfaces.engine import (
    Drafter,
    Engine,
    Executor,
    KvCacheManager,
    MaskTask,
    Prefix,
    Scheduler,
    StructuredOutput,
    WorkerLauncher,
)
from vllm_di.components.interfaces.model import (
    ExpertsFunction,
    GraphPolicy,
    Loader,
    Model,
    ModelProgram,
    ModelStep,
    NamedWeight,
    Quantization,
    ShapePolicy,
    StepFunction,
    WeightPart,
)
from vllm_di.components.interfaces.ops import (
    Activation,
    Op,
    OpLibrary,
    Ops,
    OpTable,
    Recorder,
    Replay,
    Reuse,
)
from vllm_di.components.interfaces.server import (
    ChatTemplate,
    ContentDelta,
    EngineClient,
    Metrics,
    ParserEvent,
    ParserRequest,
    ParserState,
    ReasoningDelta,
    ReasoningParser,
    Replica,
    ReplicaLoad,
    RequestTimes,
    Router,
    Server,
    ThoughtMarks,
    Tokenizer,
    ToolCallArguments,
    ToolCallBegun,
    ToolParser,
)
from vllm_di.components.interfaces.transfer import KvTransfer
from vllm_di.components.interfaces.worker import (
    ModelRunner,
    Pooler,
    Sampler,
    SchedulerLimits,
    SequenceState,
    Worker,
)

INTERFACE_VERSION = "2.0"
"""Of these pages and of ``messages.py``; docs/interface-versions.md has the policy."""

__all__ = [
    "DEFAULT_ROLE",
    "INTERFACE_VERSION",
    "Activation",
    "AttentionBackend",
    "AttentionSpec",
    "BatchPlan",
    "CacheTensor",
    "ChatTemplate",
    "Communicator",
    "ContentDelta",
    "Device",
    "DeviceMemory",
    "Drafter",
    "Engine",
    "EngineClient",
    "Executor",
    "ExpertsFunction",
    "GraphPolicy",
    "GroupTables",
    "KvCacheManager",
    "KvLayout",
    "KvTransfer",
    "LayerCache",
    "Loader",
    "MaskTask",
    "Metrics",
    "Model",
    "ModelProgram",
    "ModelRunner",
    "ModelStep",
    "NamedWeight",
    "Op",
    "OpLibrary",
    "OpTable",
    "Ops",
    "ParserEvent",
    "ParserRequest",
    "ParserState",
    "Placement",
    "PlanShape",
    "Pooler",
    "Prefix",
    "Quantization",
    "ReasoningDelta",
    "ReasoningParser",
    "Recorder",
    "Replay",
    "Replica",
    "ReplicaLoad",
    "RequestTimes",
    "Reuse",
    "Router",
    "Sampler",
    "Scheduler",
    "SchedulerLimits",
    "SequenceState",
    "Server",
    "ShapePolicy",
    "StepFunction",
    "StructuredOutput",
    "ThoughtMarks",
    "Tokenizer",
    "ToolCallArguments",
    "ToolCallBegun",
    "ToolParser",
    "TracedCache",
    "UnrotatedForward",
    "WeightPart",
    "Worker",
    "WorkerLauncher",
    "fixed",
]
