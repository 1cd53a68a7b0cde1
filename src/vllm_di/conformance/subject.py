"""The platform under test: an assembly, opened through the public seams."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch

from vllm_di.components.interfaces import DEFAULT_ROLE, Engine, Placement
from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.conformance import tiny
from vllm_di.conformance.outcomes import NotDeclared, NotRun
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.compose import ConfigTree
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.manifest import Capabilities, Manifest
from vllm_di.containers.overrides import read
from vllm_di.containers.slots import EngineContainer, WorkerContainer, slots
from vllm_di.containers.stages import prefix, split
from vllm_di.errors import ConfigError, PortError, nearest

T = TypeVar("T")
OWN = ("model", "model.path", "loader", "tokenizer", "chat_template")
"""Keys that the suite sets itself, because it brings its own models."""
PREFIX_CACHING = "kv_cache_manager.prefix_caching"
"""Key of cache managers whose prefix cache can be turned off; one of a port may lack it."""
BLOCKS = 96
"""KV blocks of a worker: several full sequences of a tiny model."""
USUAL_HEAD = 32
NO_MODEL = ("model_name", "checkpoint")
OF_WORKER = (*slots(WorkerContainer), "platform")
"""What the keys of a worker's overrides begin with."""


class Subject:
    """A platform and overrides of the command line, under test.

    ``form`` says how long the long checks are. Opened parts live as long as their ``with`` block.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        *,
        form: Literal["short", "full"] = "short",
        seed: int = 1,
        config_dirs: Sequence[str] = (),
    ) -> None:
        for text in overrides:
            if read(text).key in OWN:
                raise ConfigError(f"{text}: the suite brings its own models; leave this key out")
        self.overrides, self.form, self.seed = list(overrides), form, seed
        self.config_dirs = list(config_dirs)
        self._assemblies: dict[tuple[str, ...], Assembly] = {}
        self._kept: dict[str, Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-di-conform-")

    def close(self) -> None:
        """Remove the checkpoints that were written."""
        self._folder.cleanup()

    @property
    def full(self) -> bool:
        return self.form == "full"

    # -- what it declares -----------------------------------------------------------------------

    @cached_property
    def manifest(self) -> Manifest:
        """The platform in its own words."""
        folder = self.model_folder(head_size=USUAL_HEAD)  # before it is known what it declares
        return self.assembly(model=folder).platform

    @property
    def platform(self) -> str:
        return self.manifest.name

    @property
    def declared(self) -> Capabilities:
        return self.manifest.capabilities

    @property
    def simulated(self) -> bool:
        workers = self.assembly().workers.values()
        return any(node["device"].get("simulated") for stages in workers for node in stages)

    @cached_property
    def head_size(self) -> int:
        """Of the tiny models: 32, or the smallest that the platform declares."""
        sizes = self.declared.head_sizes or (USUAL_HEAD,)
        return USUAL_HEAD if USUAL_HEAD in sizes else min(sizes)

    def dtype(self, name: str) -> torch.dtype:
        """Raises NotDeclared for one that the manifest does not name."""
        if name not in self.declared.dtypes:
            raise NotDeclared(f"its dtypes are {', '.join(self.declared.dtypes)}")
        found: torch.dtype = getattr(torch, name)
        return found

    @cached_property
    def lacks_driver(self) -> str:
        """Why the platform cannot run here at all; empty where it can. What ``platform=auto`` looks
        for may be absent where the device opens all the same: a compiler's host, for one."""
        needed = dict.fromkeys(name.split(".")[0] for name in self.manifest.requires)
        absent = [m for m in needed if util.find_spec(m) is None]
        if absent and not self.simulated:
            return f"not installed: {', '.join(absent)}"
        try:
            with self.parts("device"):
                return ""
        except PortError as error:
            return str(error)

    def need_driver(self) -> None:
        """Raises NotRun where the platform cannot run here."""
        if self.lacks_driver:
            raise NotRun(self.lacks_driver)

    @cached_property
    def roles(self) -> dict[str, list[list[str]]]:
        """Role to the overrides of each of its stages; one role of one stage, ``default``, on a
        platform that names none."""
        found = split(ConfigTree.find(self.config_dirs), self.overrides).roles
        own = [text for text in self.overrides if read(text).slot in OF_WORKER]
        roles = {role: [stage.overrides for stage in stages] for role, stages in found.items()}
        return roles or {DEFAULT_ROLE: [own]}

    @cached_property
    def stages(self) -> list[str]:
        """What the keys of its workers begin with: ``stages.N.`` or ``ROLE.`` for each; else one,
        empty."""
        return [
            prefix(role, index, len(stages))
            for role, stages in self.roles.items()
            for index in range(len(stages))
        ]

    @property
    def exact_dtype(self) -> str:
        """For checks of whole models: float32 where it is declared, else the first that is."""
        names = self.declared.dtypes
        return "float32" if "float32" in names else names[0]

    @property
    def slack(self) -> float:
        """Nats that two log-probs of the same thing in ``exact_dtype`` may be apart."""
        return {"float32": 2e-4, "float16": 2e-2, "bfloat16": 5e-2}[self.exact_dtype]

    # -- opened parts -----------------------------------------------------------------------------

    def model_folder(
        self,
        name: str = "gqa",
        *,
        head_size: int | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        num_files: int = 1,
        variant: str = "",
    ) -> Path:
        """A tiny checkpoint; written once for each ``variant``."""
        size = head_size or self.head_size
        folder = Path(self._folder.name) / f"{name}-{size}{variant}"
        if not folder.exists():
            tiny.write(folder, name, size, weights=weights, num_files=num_files)
        return folder

    def overrides_of(self, model: str | Path) -> list[str]:
        """What a user would write to run the subject on a tiny model."""
        folder = self.model_folder(model) if isinstance(model, str) else model
        return [*self.overrides, *on_model(folder), *self.layers()]

    def layers(self) -> list[str]:
        """One layer of a tiny model for each stage, unless the subject shares them out itself."""
        if any("model.layers=" in text for text in self.overrides):
            return []
        return [
            f"{prefix(role, index, count)}{one_layer(index, count)}"
            for role, stages in self.roles.items()
            if (count := len(stages)) > 1
            for index in range(count)
        ]

    def assembly(self, *more: str, model: str | Path = "gqa") -> Assembly:
        """The subject's overrides on a tiny model, and ``more``."""
        overrides = (*self.overrides_of(model), *more)
        if overrides not in self._assemblies:
            self._assemblies[overrides] = assemble(overrides, self.config_dirs)
        return self._assemblies[overrides]

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gave when ``name`` was first asked for: several cases compare with it."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    @contextmanager
    def parts(
        self,
        *slots: str,
        more: Collection[str] = (),
        model: str = "gqa",
        placement: Placement | None = None,
        **objects: Any,
    ) -> Iterator[WorkerContainer]:
        """A worker container with some slots, or all when none is named."""
        assembly = self.assembly(*more, model=model)
        given = placement or Placement()
        with opened(WorkerContainer, assembly, only=slots, placement=given, **objects) as found:
            yield found

    @contextmanager
    def engine(
        self,
        *more: str,
        model: str | Path = "gqa",
        worker: Mapping[str, Any] | None = None,
        **objects: Any,
    ) -> Iterator[Engine]:
        """A started engine. Objects stand in for its slots, those in ``worker`` for a worker's."""
        assembly = self.assembly(*more, model=model)
        launcher = Launcher(assembly, objects=worker)
        with opened(EngineContainer, assembly, launcher=launcher, **objects) as container:
            yield container.engine()

    def has_key(self, key: str) -> bool:
        """Whether a node of the engine, or of every worker, has a key, ``device.memory_budget``."""
        slot, _, name = key.partition(".")
        engine, stages = self.assembly().engine, self.assembly().stages
        return all(name in node[slot] for node in ([engine] if slot in engine else stages))

    @property
    def prefix_cache_off(self) -> list[str]:
        """The override that turns the prefix cache off; none for a cache manager that has no such
        key. Requests that must share nothing are kept ``apart`` by their salts as well."""
        return [f"{PREFIX_CACHING}=false"] if self.has_key(PREFIX_CACHING) else []

    def need_prefix_cache(self) -> None:
        """Raises NotDeclared where prompts share no blocks: the manager's key says so or, where it
        has no such key, it looks nothing up."""
        if self.has_key(PREFIX_CACHING):
            if not self.assembly().engine["kv_cache_manager"]["prefix_caching"]:
                raise NotDeclared(f"{PREFIX_CACHING} is false")
        elif not self._looks_up_prefixes:
            raise NotDeclared(
                "its cache manager has no key prefix_caching and, by its stats(), looks nothing up"
            )

    @cached_property
    def _looks_up_prefixes(self) -> bool:
        params = SamplingParams(temperature=0, max_tokens=1)
        request = EngineRequest(request_id="any", prompt_token_ids=[*range(64)], params=params)
        with self.engine() as engine:
            engine.add(request)
            while engine.has_work():
                engine.step()
            return engine.step().stats.prefix_cache_queries > 0

    def target(self, slot: str, stage: int = 0) -> str:
        """The class that fills a slot, as its dotted name."""
        a = self.assembly()
        nodes = {**a.server, **a.engine, **a.stages[stage]}
        if slot not in nodes:
            raise KeyError(f"{slot}{nearest(slot, nodes)}")
        return str(nodes[slot]["_target_"])

    @cached_property
    def config_hash(self) -> str:
        """Of what is judged, as ``hash_of``."""
        return self.hash_of(self.assembly())

    @staticmethod
    def hash_of(a: Assembly) -> str:
        """SHA-256 of the composed config, but for where the suite's models lie."""
        workers = [
            {**node, "model": {k: v for k, v in node["model"].items() if k != "path"}}
            for stages in a.workers.values()
            for node in stages
        ]
        loader = {k: v for k, v in a.stages[0]["loader"].items() if k == "_target_"}
        plain = {
            "server": {k: v for k, v in a.server.items() if k != "tokenizer"},
            "engine": a.engine,
            "workers": [{**node, "loader": loader} for node in workers],
            "settings": {k: v for k, v in a.settings.items() if k not in NO_MODEL},
        }
        return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()


def one_layer(stage: int, num_stages: int) -> str:
    """The override that gives a stage its layer of a tiny model; the last has what is left."""
    end = "null" if stage == num_stages - 1 else stage + 1
    return f"model.layers=[{stage},{end}]"


def on_model(folder: Path) -> list[str]:
    """Overrides that run a platform on a tiny model."""
    return [
        "model=local",
        f"model.path={folder}",
        "tokenizer=bytes",
        "chat_template=plain",
        f"worker.num_blocks={BLOCKS}",
        "scheduler.max_num_seqs=8",
        "scheduler.max_num_batched_tokens=256",
    ]


REFERENCE = (
    "platform=cpu",
    "ops=torch",
    "attention=sdpa",
    "graph=eager",
    "model.dtype=float32",
    "kv_cache_manager.prefix_caching=false",
)
"""What every platform is compared with: plain torch in fp32 on the host."""
