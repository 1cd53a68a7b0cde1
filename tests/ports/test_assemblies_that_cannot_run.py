"""A port that lacks what the rest of the assembly needs: an error at the start that names the place
and the key to change, never a wrong token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ports.frozen.package import NAME, files, frozen_port
from tests.ports.packages import installed

from vllm_di import LLM, SamplingParams
from vllm_di.errors import ConfigError, PortError

STRICT = str(Path(__file__).parents[1] / "components" / "program" / "strict" / "conf")
PLATFORM = f"{NAME}/conf/platform/{NAME}.yaml"
TINY = ("model=tiny", "model.dtype=float32", "trust=[tests]")
DRAFTS = ("drafter._target_=tests.growth.parts.PromptLookup",)
GROUPS = (
    "model.sliding_window=16",
    "model.layer_types=[sliding_attention,full_attention]",
    "executor=inline",
    "executor.step_timeout=100",
)
OURS = ("kv_layout=hnd", "attention=paged", "worker=standard", "worker.num_blocks=512")
SHAPES = "max_model_len=256"

CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "runs one token of a sequence in a step, and drafts are asked for": (
        (f"platform={NAME}", "scheduler=continuous", "kv_cache_manager=paged", *DRAFTS),
        r"limits\.drafts=false.*take drafter=none",
    ),
    "has a scheduler that checks no drafts": (
        (f"platform={NAME}", "limits=standard", *DRAFTS),
        r"checks no drafts; set drafter=none",
    ),
    "has one block table, and the model two KV groups": (
        (f"platform={NAME}", *GROUPS),
        r"2 KV groups; choose model_runner=standard",
    ),
    "has a cache manager of one KV group": (
        (f"platform={NAME}", *GROUPS, "model_runner=standard", "program=eager"),
        r"manages one KV group, but the model has 2; choose kv_cache_manager=paged",
    ),
    "has a layout that our attention cannot read": (
        (f"platform={NAME}", "attention=paged"),
        r"PagedAttention reads the layouts hnd, not 'frozen_2_0'; take kv_layout=hnd, or sdpa here",
    ),
    "has attention that cannot read our layout": (
        (f"platform={NAME}", "kv_layout=hnd", "worker=standard", "worker.num_blocks=512"),
        r"FrozenAttention cannot read the KV layout 'hnd'; it reads frozen_2_0",
    ),
    "replaces its cache in each step, beside attention that writes in place": (
        ("platform=strict", SHAPES, "attention=paged"),
        r"PagedAttention has no export\(\).*attention=sdpa has one",
    ),
    "replaces its cache in each step, beside a layout of another shape": (
        ("platform=strict", SHAPES, "kv_layout=nhd"),
        r"kv_layout=hnd, not 'nhd'",
    ),
    "replaces its cache in each step, beside graphs that hold its address": (
        ("platform=strict", SHAPES, "graph=tape"),
        r"graph",
    ),
    "has shapes for fewer sequences than may run": (
        ("platform=strict", SHAPES, "scheduler.max_num_seqs=5"),
        r"decode_seqs.*lower scheduler\.max_num_seqs",
    ),
    "has shapes for fewer tokens than a step may have": (
        ("platform=strict", SHAPES, "scheduler.max_num_batched_tokens=64"),
        r"prefill_queries.*lower scheduler\.max_num_batched_tokens",
    ),
    "has shapes for a shorter context than the model's": (
        ("platform=strict", "max_model_len=1024"),
        r"columns.*lower model\.max_model_len",
    ),
    "has shapes for decodes and prefills apart, and no such limit": (
        ("platform=strict", SHAPES, "limits.mixed_steps=true"),
        r"set limits\.mixed_steps=false",
    ),
    "has shapes for fewer prompts than may prefill at once": (
        ("platform=strict", SHAPES, "limits.max_prefill_rows=3"),
        r"set limits\.max_prefill_rows=2",
    ),
}
FOUND_LATE = ("has one block table, and the model two KV groups",)
"""Only when the worker is told of the groups: the message names the key, and no file."""
PLACE = r"^(\S+\.yaml:\d+|command line: \S+): (\w+)(: |\.)"


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with frozen_port(tmp_path_factory.mktemp("site")):
        yield


def start(*overrides: str) -> list[int]:
    given = [o.replace("max_model_len", "model.max_model_len") for o in overrides]
    with LLM(overrides=[*TINY, *given], config_dirs=[STRICT]) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        return llm.generate("hello", greedy)[0].outputs[0].token_ids


@pytest.mark.parametrize("what", CASES)
def test_a_port_that(what: str) -> None:
    overrides, message = CASES[what]
    with pytest.raises(ConfigError) as caught:
        start(*overrides)
    said = str(caught.value)
    assert re.search(PLACE, said) or what in FOUND_LATE, said
    assert re.search(message, said), said


@pytest.mark.filterwarnings("ignore:.*stand-in")
def test_what_the_messages_propose_does_run() -> None:
    want = start("platform=cpu")
    drafting = [f"platform={NAME}", "limits=standard", "model_runner=standard"]
    drafting += ["scheduler=continuous", "kv_cache_manager=paged", *DRAFTS]
    assert start(*drafting) == want
    assert start("platform=strict", SHAPES) == want
    ours = (*OURS, "model_runner=standard", "program=eager", "kv_cache_manager=paged")
    assert start(f"platform={NAME}", *GROUPS, *ours) == start("platform=cpu", *GROUPS)


@pytest.mark.parametrize("version", ["1.0", "1.1", "2.1", "3.0"])
def test_a_port_of_another_version(version: str, tmp_path: Path) -> None:
    """Refused with both numbers, before any class of it is imported."""
    text = files()[PLATFORM]
    names = {PLATFORM: text.replace('"2.0"', f'"{version}"').replace(NAME, "aged_port", 1)}
    old = {p.replace(NAME, "aged_port"): t for p, t in (files() | names).items()}
    old = {p: t.replace(NAME, "aged_port") for p, t in old.items()}
    old = {p: "1 / 0\n" if p.endswith(".py") else t for p, t in old.items()}
    with installed(tmp_path, old, name="aged", port="aged_port"):
        place = r"aged_port\.yaml:\d+: platform\.interface: aged_port was written for "
        numbers = rf"interfaces {re.escape(version)}, this engine has 2\.0 and serves 2\.0"
        with pytest.raises(PortError, match=place + numbers):
            start("platform=aged_port")
