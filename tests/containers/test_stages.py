"""Platforms with stages: each composed on its own, the user's choices honoured, splits that make no
sense refused with their place."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.containers.two_platforms import LINES, TWO, config_dir

from vllm_di.components.executor.pipeline import agreed, check_fit
from vllm_di.components.interfaces import Placement
from vllm_di.components.kv_groups import sized
from vllm_di.components.messages import CacheSize, KvGroup, KvSpec, LimitsReport, WorkerReport
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.slots import WorkerContainer
from vllm_di.errors import ConfigError

BASE = ["platform=two", "model=tiny"]


def targets(assembly: Assembly, slot: str) -> list[str]:
    return [nodes[slot]["_target_"].rpartition(".")[2] for nodes in assembly.stages]


def test_each_stage_is_composed_on_its_own(tmp_path: Path) -> None:
    found = assemble(BASE, [config_dir(tmp_path)])
    assert targets(found, "attention") == ["PagedAttention", "SdpaAttention"]
    assert [nodes["model"]["layers"] for nodes in found.stages] == [[0, 1], [1, None]]
    assert found.engine["executor"]["_target_"].endswith("PipelineExecutor")
    assert found.settings["platform"]["name"] == "two"
    file = str(tmp_path / "platform" / "two.yaml")
    assert found.place("stages.1.model.layers") == f"{file}:{LINES['stages.1.model.layers']}"
    assert str(found.choices["stages.1.ops"].origin) == f"{file}:{LINES['stages.1.ops']}"
    assert found.choices["stages.0.ops"].origin.file == "conf/platform/cpu.yaml"
    assert "ops" not in found.choices and found.choices["scheduler"].option == "continuous"
    assert Assembly.decode(found.encode()) == found


def test_the_users_overrides_reach_every_stage_or_one(tmp_path: Path) -> None:
    folder = [config_dir(tmp_path)]
    both = assemble([*BASE, "attention=sdpa", "kv_layout.block_size=16"], folder)
    assert targets(both, "attention") == ["SdpaAttention"] * 2
    assert [nodes["kv_layout"]["block_size"] for nodes in both.stages] == [16, 16]
    assert str(both.choices["stages.0.attention"].origin) == "command line: attention=sdpa"
    one = assemble([*BASE, "stages.1.attention=paged", "stages.1.ops.rms_norm=cpu"], folder)
    assert targets(one, "attention") == ["PagedAttention"] * 2
    ops = [nodes["ops"]["rms_norm"] for nodes in one.stages]
    assert ops[0] == "auto" and ops[1]["_target_"].endswith("CpuOps")
    assert one.place("stages.1.ops.rms_norm") == "command line: stages.1.ops.rms_norm=cpu"
    assert str(one.choices["stages.1.attention"].origin) == "command line: stages.1.attention=paged"
    # one for a stage beats one for all, wherever it stands
    mixed = assemble([*BASE, "stages.0.attention=paged", "attention=sdpa"], folder)
    assert targets(mixed, "attention") == ["PagedAttention", "SdpaAttention"]


def test_the_engine_is_one_and_its_values_reach_the_workers(tmp_path: Path) -> None:
    text = TWO.replace("platform:\n", "scheduler:\n  max_num_seqs: 7\n\nplatform:\n")
    found = assemble([*BASE, "executor.depth=1"], [config_dir(tmp_path, text)])
    assert found.engine["executor"]["depth"] == 1
    assert [nodes["worker"]["max_num_seqs"] for nodes in found.stages] == [7, 7]


def test_explain_shows_the_slots_of_each_stage(tmp_path: Path) -> None:
    folder = [config_dir(tmp_path)]
    told = explain(assemble([*BASE, "stages.0.attention=sdpa"], folder), config_dirs=folder)
    rows = {row.slot: row for row in told.rows}
    assert rows["stages.0.attention"].place == "command line: stages.0.attention=sdpa"
    assert rows["stages.1.attention"].place.endswith(f"two.yaml:{LINES['stages.1.attention']}")
    assert rows["stages.1.attention"].chosen_by == "platform"
    assert rows["stages.1.attention"].alternatives and "attention" not in rows
    ops = {row.op: row.runs_on for row in told.ops}
    assert ops["stages.1.rms_norm"] == "torch" != ops["stages.0.rms_norm"]


def test_errors_of_a_part_name_its_stage(tmp_path: Path) -> None:
    folder = [config_dir(tmp_path)]
    found = assemble([*BASE, "+stages.1.attention.blok=3"], folder)
    with (
        pytest.raises(ConfigError, match=r"stages\.1\.attention\.blok: SdpaAttention takes no"),
        opened(WorkerContainer, found, stage=1, placement=Placement()),
    ):
        pass
    with opened(WorkerContainer, found, stage=0, only=["attention"], placement=Placement()):
        pass


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.7.attention=sdpa", r"no such stage; platform=two has stages\.0, stages\.1"),
        ("stages.x.attention=sdpa", r"'stages\.x\.attention=sdpa': no such stage"),
        ("stages=[]", r"'stages=\[\]': no such stage"),
        ("stages.1=sdpa", r"write stages\.1\.KEY=VALUE"),
        ("stages.1.attention=sdpaa", r"stages\.1\.attention=sdpaa': .* did you mean 'sdpa'"),
        ("stages.1.attentio=sdpa", r"stages\.1\.attentio=sdpa': .* did you mean 'attention'"),
        ("stages.1.platform=cpuu", r"stages\.1\.platform=cpuu': .* did you mean 'cpu'"),
        ("stages.1.platform=two", r"stages\.1: platform=two has stages itself"),
        ("stages.1.executor=inline", "one executor for all stages: write executor=inline"),
        ("model.layers=[0,1]", r"layers=\[0,1\]: stages\.1\.model.layers .*\[0, 1\] run twice"),
        ("stages.1.model.layers=[2,null]", r"ends at 1: the layers \[1, 2\] run nowhere"),
        ("stages.0.model.layers=[0,2]", "leaves no layer of 2 to the stages after it"),
        ("stages.0.model.layers=[0,null]", "leaves no layer of 2 to the stages after it"),
        ("stages.0.model.layers=[1,2]", "the model starts at 0"),
        ("stages.1.model.layers=null", r"expected \[first, end\]"),
        ("stages.0.atention=sdpa", "^command line: 'stages.0.atention=sdpa': no such group or key"),
        ("stage.0.attention=sdpa", "no key 'stage'; did you mean 'stages'"),
        ("model.num_hidden_layers=3", None),
        ("stages.1.model.layers=[1,3]", "the model has 2 layers"),
        ("stages.1.model.vocab_size=9", r"vocab_size is 9, but .* is 320 \(conf/model/tiny"),
    ],
)
def test_stages_that_make_no_sense(override: str, words: str | None, tmp_path: Path) -> None:
    folder = [config_dir(tmp_path)]
    if words is None:
        assert len(assemble([*BASE, override], folder).stages) == 2
        return
    with pytest.raises(ConfigError, match=words):
        assemble([*BASE, override], folder)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[0,1]", "[0,2]", r"two\.yaml:7: stages\.0\.model\.layers is \[0, 2\], which leaves"),
        ("=[1,null]", "=[0,2]", r"two\.yaml:11: stages\.1\.model\.layers is \[0, 2\].* run twice"),
        ("    - platform=cpu\n", "", r"two\.yaml:8: stages\.1 names no platform"),
        ("- platform=cpu", "- platform=cpuu", r"two\.yaml:8: 'platform=cpuu'.*did you mean 'cpu'"),
        ("- ops=torch", "- ops=torhc", r"two\.yaml:9: 'ops=torhc'.* did you mean 'torch'"),
        ("- ops=torch", "- ops: torch", r"two\.yaml:9: stages\.1: expected an override"),
        ("platform:\n", "kv_layout:\n  block_size: 16\nplatform:\n", r"two\.yaml:13: kv_layout: a"),
        ("executor: pipeline", "attention: sdpa", r"two\.yaml:4: attention: a platform with"),
    ],
)
def test_platforms_that_make_no_sense(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = (
        TWO.replace(old, new, 1)
        if old != "    - platform=cpu\n"
        else TWO.replace("  - - platform=cpu\n    - ops", "  - - ops")
    )
    assert text != TWO
    with pytest.raises(ConfigError, match=words):
        assemble(BASE, [config_dir(tmp_path, text)])


@pytest.mark.parametrize("stages", ["3", "[]", "[platform=cpu]", "{a: b}"])
def test_stages_are_lists_of_overrides(stages: str, tmp_path: Path) -> None:
    head, tail = TWO.split("stages:\n")
    text = f"{head}stages: {stages}\n\nplatform:{tail.split('platform:')[1]}"
    with pytest.raises(ConfigError, match=r"two\.yaml:6: stages: expected a list with one list"):
        assemble(BASE, [config_dir(tmp_path, text)])


def test_other_platforms_have_no_stages(tmp_path: Path) -> None:
    folder = [config_dir(tmp_path)]
    for rest in (["platform=cpu"], []):
        with pytest.raises(ConfigError, match=r"has no stages; platforms that have: .*two"):
            assemble([*rest, "stages.0.attention=sdpa"], folder)
    assert len(assemble(["platform=cpu", "model=tiny"], folder).stages) == 1


def test_an_executor_that_knows_no_stages_is_refused(tmp_path: Path) -> None:
    found = assemble([*BASE, "executor=inline"], [config_dir(tmp_path)])
    with pytest.raises(ConfigError, match="platform=two has 2 stages; take executor=pipeline"):
        Launcher(found).open(Placement())


def report(**changes: object) -> WorkerReport:
    values: dict[str, object] = {
        "block_size": 32,
        "kv_specs": [KvSpec(layer=0, num_kv_heads=1, head_size=1)],
        "limits": LimitsReport(max_prefill_rows=4),
        "max_model_len": 64,
        "vocab_size": 9,
        "eos_token_ids": [0],
        "device": "cpu",
        "dtype": "float32",
        "weight_bytes": 5,
        "details": {"memory_free": 10_000},
    }
    return WorkerReport(**(values | changes))  # type: ignore[arg-type]


def test_the_pipeline_reports_what_is_true_of_all_stages(tmp_path: Path) -> None:
    launcher = Launcher(assemble(BASE, [config_dir(tmp_path)]))
    strict = LimitsReport(max_prefill_rows=2, mixed_steps=False, null_block=True)
    stages = [report(), report(limits=strict, device="x")]
    groups = [KvGroup([0, 1])]
    whole = sized(agreed(stages, launcher), groups, [CacheSize(9, 100), CacheSize(7, 100)])
    assert (whole.num_blocks, whole.bytes_per_block, whole.weight_bytes) == (7, 200, 10)
    assert whole.kv_groups == groups
    assert whole.limits == strict and len(whole.kv_specs) == 2 and whole.device == "cpu, x"
    assert [d["memory_free"] for d in whole.details["stages"]] == [10_000, 10_000]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "bfloat16"}, r"conf/model/base\.yaml:\d+: stages\.1\.model\.dtype .*bfloat16"),
        (
            {"block_size": 16},
            r"hnd\.yaml:\d+: stages\.1\.kv_layout\.block_size comes out as 16.*32",
        ),
        ({"vocab_size": 3}, r"stages\.1\.model\.vocab_size comes out as 3"),
        ({"max_model_len": 3}, r"stages\.1\.model\.max_model_len comes out as 3"),
    ],
)
def test_stages_that_do_not_fit_together(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    launcher = Launcher(assemble(BASE, [config_dir(tmp_path)]))
    with pytest.raises(ConfigError, match=words):
        agreed([report(), report(**changes)], launcher)


def test_stages_that_want_more_of_one_device_than_it_has(tmp_path: Path) -> None:
    launcher = Launcher(assemble(BASE, [config_dir(tmp_path)]))
    words = r"stages\.1\.worker\.memory_fraction.* want .* are free"
    with pytest.raises(ConfigError, match=words):
        check_fit([report(), report()], [CacheSize(9, 100), CacheSize(99, 1200)], launcher)
