"""Workers of several roles from one YAML: composed, overridden, explained, refused and run."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from tests.containers.two_platforms import config_dir
from tests.containers.two_roles import LINES, ROLES, TwoRoles

from vllm_di.components.executor.multiprocess import MultiprocessExecutor
from vllm_di.components.executor.pipeline import PipelineExecutor
from vllm_di.components.interfaces import Placement
from vllm_di.components.messages import NewSequence, SamplingParams, ScheduledSequence, StepPlan
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import Launcher, open_worker, opened
from vllm_di.containers.slots import EngineContainer
from vllm_di.errors import ConfigError, EngineDeadError

BASE = ["platform=two", "model=tiny", "model.dtype=float32", "trust=[tests]"]


def found(folder: Path, *overrides: str, text: str = ROLES) -> Assembly:
    return assemble([*BASE, *overrides], [config_dir(folder, text)])


def cls(assembly: Assembly, role: str, slot: str, stage: int = 0) -> str:
    return str(assembly.workers[role][stage][slot]["_target_"]).rpartition(".")[2]


def test_each_role_is_composed_with_its_places(tmp_path: Path) -> None:
    both = found(tmp_path)
    assert {role: len(stages) for role, stages in both.workers.items()} == {
        "prefill": 2,
        "decode": 1,
    }
    assert cls(both, "prefill", "attention") == "SdpaAttention"
    assert cls(both, "prefill", "attention", 1) == "PagedAttention"
    file = tmp_path / "platform" / "two.yaml"
    line = LINES["decode.worker.num_blocks"]
    assert both.place("decode.worker.num_blocks") == f"{file}:{line}"
    assert both.place("workers.decode") == f"{file}:{LINES['workers.decode']}"
    assert both.choices["prefill.stages.0.attention"].option == "sdpa"
    assert both.of_role("decode").platform_of(0).name == "openvino"
    assert both.of_role("prefill").platform_of(1).name == "cpu"
    assert Assembly.decode(both.encode()) == both


def test_overrides_reach_all_one_role_or_one_stage(tmp_path: Path) -> None:
    both = found(
        tmp_path,
        "model.rms_norm_eps=0.5",
        "prefill.stages.1.attention=hybrid",
        "prefill.attention=paged",
        "decode.worker.num_blocks=9",
    )
    eps = [w["model"]["rms_norm_eps"] for stages in both.workers.values() for w in stages]
    assert eps == [0.5, 0.5, 0.5]
    assert cls(both, "prefill", "attention") == "PagedAttention"
    assert cls(both, "prefill", "attention", 1) == "HybridAttention"
    assert both.workers["decode"][0]["worker"]["num_blocks"] == 9
    assert both.workers["prefill"][0]["worker"]["num_blocks"] is None
    origin = both.choices["prefill.stages.0.attention"].origin
    assert str(origin) == "command line: prefill.attention=paged"


def test_explain_lists_the_slots_of_each(tmp_path: Path) -> None:
    both = found(tmp_path, "decode.attention=sdpa")
    shown = explain(both, config_dirs=[tmp_path], ops=False)
    rows = {row.slot: row for row in shown.rows}
    assert rows["decode.attention"].place == "command line: decode.attention=sdpa"
    assert rows["prefill.stages.1.attention"].target.endswith("PagedAttention")
    assert "attention" not in rows


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["platform=cpu", "decode.worker.num_blocks=5"], "no role 'decode'; it names no roles"),
        (["decode.stages.0.attention=sdpa"], "platform=auto has no role 'decode'"),
        (["platform=two", "prefil.attention=sdpa"], "it has prefill, decode; did you mean 'pre"),
        (["platform=two", "decod.stages.0.attention=sdpa"], "no role 'decod'; .*mean 'decode'"),
    ],
)
def test_a_role_that_the_platform_lacks(overrides: list[str], words: str, tmp_path: Path) -> None:
    folder = config_dir(tmp_path, ROLES)
    with pytest.raises(ConfigError, match=f"^command line: '{overrides[-1]}': .*{words}"):
        assemble(["model=tiny", *overrides], [folder])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decode.attention=sdap", r"'decode\.attention=sdap': .* did you mean 'sdpa'"),
        ("decode.atention=sdpa", r"'decode\.atention=sdpa': .* did you mean 'attention'"),
        ("decode.scheduler=continuous", "one scheduler for all stages: write scheduler=continuous"),
        ("decode=sdpa", r"write decode\.KEY=VALUE"),
        ("decode.stages.3.attention=sdpa", r"no such stage; platform=two has decode\.stages\.0"),
        ("stages.0.attention=sdpa", r"has workers of the roles prefill, decode: write ROLE\.KEY"),
        ("draft.attention=sdpa", "platform=two has no role 'draft'; it has prefill, decode"),
        ("prefill.stages.1.model.layers=null", r"prefill\.stages\.1\.model\.layers: expected"),
        ("decode.model.layers=[1,null]", r"decode\.model\.layers is \[1, None\], but the model"),
    ],
)
def test_what_reaches_no_worker_is_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        found(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workers: [a]", r"two\.yaml:3: workers: expected a mapping of roles to stages"),
        ("workers: {}", r"two\.yaml:3: workers: expected a mapping of roles to stages"),
        ("workers:\n  decode: platform=cpu", r"two\.yaml:4: workers\.decode: expected a list"),
        ("workers:\n  decode: [[cpu]]", r"two\.yaml:4: workers\.decode\.0: expected an override"),
        ("workers:\n  attention: [[platform=cpu]]", r"two\.yaml:4: .*is a name of the config"),
        ("workers:\n  pre-fill: [[platform=cpu]]", r"two\.yaml:4: .*'pre-fill' is not a name"),
        ("workers:\n  decode: [[ops=torch]]", r"two\.yaml:4: decode names no platform"),
        ("workers:\n  decode: [[platform=two]]", r"decode: platform=two has stages itself"),
        ("stages: [[platform=cpu]]\nworkers: {a: [[platform=cpu]]}", r"two\.yaml:3: .* leave one"),
    ],
)
def test_roles_that_make_no_sense(text: str, words: str, tmp_path: Path) -> None:
    end = "\n\nplatform:\n  name: two\n  level: declared\n"
    with pytest.raises(ConfigError, match=words):
        found(tmp_path, text=f"# @package _global_\n# Bad.\n{text}{end}")


@pytest.mark.parametrize("executor", ["inline", "multiprocess", "pipeline"])
def test_an_executor_refuses_roles_that_it_does_not_know(executor: str, tmp_path: Path) -> None:
    text = ROLES.replace("executor:\n  _target_: tests.containers.two_roles.TwoRoles\n", "")
    both = found(tmp_path, f"executor={executor}", text=text)
    words = rf"two\.yaml:4: workers\.prefill: .*Executor \(conf/executor/{executor}\.yaml:\d+\) "
    words += r"runs no workers of the role 'prefill'; it knows default"
    with (
        pytest.raises(ConfigError, match=words),
        opened(EngineContainer, both, launcher=Launcher(both)),
    ):
        pass
    with pytest.raises(ConfigError, match=words):
        explain(both, config_dirs=[tmp_path])


def test_a_role_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    plain = assemble(["platform=cpu", "model=tiny"])
    with pytest.raises(ConfigError, match=r"has no workers of the role 'draft'; it has default"):
        Launcher(plain).for_role("draft")
    with pytest.raises(ConfigError, match=r"role 'decoder'; it has .*did you mean 'decode'"):
        open_worker(found(tmp_path), Placement(role="decoder")).__enter__()


def test_one_role_may_be_spelled_either_way(tmp_path: Path) -> None:
    end = "\nplatform:\n  name: two\n  level: declared\n"
    start = "# @package _global_\n# One.\ndefaults:\n  - override /executor: pipeline\n"
    rows = '[[platform=cpu, "model.layers=[0,1]"], [platform=cpu, "model.layers=[1,null]"]]'
    listed = found(tmp_path / "a", text=f"{start}stages: {rows}{end}")
    named = found(tmp_path / "b", text=f"{start}workers: {{default: {rows}}}{end}")
    assert named.workers == listed.workers and named.choices.keys() == listed.choices.keys()
    assert "stages.1.attention" in named.choices


def prompt(token_ids: list[int]) -> StepPlan:
    params = SamplingParams(temperature=0)
    new = NewSequence(seq_id=1, params=params, token_ids=token_ids, prompt_len=len(token_ids))
    share = ScheduledSequence(1, 0, len(token_ids), [[0]], [], True, True)
    return StepPlan(1, [new], [share], [])


@pytest.mark.parametrize("processes", [False, True])
def test_both_roles_step(processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    both = found(tmp_path, f"+executor.processes={processes}".lower(), "worker.num_blocks=128")
    with opened(EngineContainer, both, only=["executor"], launcher=Launcher(both)) as container:
        running = container.executor()
        assert isinstance(running, TwoRoles)
        report = running.start()
        assert report.details["role" if not processes else "ranks"]
        (one,) = running.prefill.submit(prompt([5, 6, 7])).result(60).tokens
        (other,) = running.decode.submit(prompt([5, 6, 7])).result(60).tokens
        assert one.token_ids == other.token_ids  # one model on both
        (next_one,) = running.decode.submit(decode(one.token_ids[0])).result(60).tokens
        assert next_one.seq_id == 1
        if processes:
            assert isinstance(running.decode, MultiprocessExecutor)
            names = [p.name for p in [*running.prefill.processes(), *running.decode.processes()]]
            assert names == ["prefill stage 0", "prefill stage 1", "decode worker 0"]
            psutil.Process(running.decode.processes()[0].pid).kill()
            with pytest.raises(EngineDeadError, match=r"^decode worker 0 was killed by signal 9"):
                running.decode.submit(decode(1)).result(60)
        assert isinstance(running.prefill, PipelineExecutor)


def decode(token_id: int) -> StepPlan:
    share = ScheduledSequence(1, 3, 1, [[]], [token_id], True, False)
    return StepPlan(2, [], [share], [])
