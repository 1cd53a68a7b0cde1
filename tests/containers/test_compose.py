"""Composition on a small tree: choices, origins, and how wrong overrides read."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vllm_di.containers.assembly import assemble
from vllm_di.containers.compose import ConfigTree
from vllm_di.containers.origins import Origin
from vllm_di.containers.overrides import model_overrides, read, repeated
from vllm_di.containers.ports import Port
from vllm_di.containers.schema import check
from vllm_di.containers.slots import GIVEN, WorkerContainer
from vllm_di.errors import ConfigError, PortError, nearest

FILES = {
    "config.yaml": """
defaults:
  - _self_
  - attention: paged
  - model: small
  - platform: auto
name: null  # a name
""",
    "attention/paged.yaml": "_target_: a.B\nsplit: 512  # tokens in a piece\n",
    "attention/sdpa.yaml": "# Plain attention.\n_target_: a.C\nopen: 'a#b'\n",
    "attention/bare.yaml": "# No keys.\n_target_: a.D\n",
    "model/small.yaml": "_target_: m.M\npath: null\nnested:\n  depth: 1\n",
    "platform/cpu.yaml": "# @package _global_\nplatform:\n  name: cpu\n  detect: {}\n",
    "platform/chip.yaml": (
        "# @package _global_\ndefaults:\n  - override /attention: sdpa\n"
        "platform:\n  name: chip\n  detect:\n    files: [/nowhere/chip*]\nname: from-chip\n"
    ),
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "conf", FILES)


@pytest.fixture
def tree(root: Path) -> ConfigTree:
    return ConfigTree([root])


def test_defaults_and_their_origins(tree: ConfigTree, root: Path) -> None:
    composition = tree.compose([])
    assert composition.values.attention.split == 512
    origin = composition.origins["attention.split"]
    assert (origin.chosen_by, origin.file, origin.line) == (
        "attention",
        str(root / "attention/paged.yaml"),
        2,
    )
    option, origin = composition.choices["attention"]
    assert (option, origin.chosen_by, origin.line) == ("paged", "default", 4)
    option, origin = composition.choices["platform"]
    assert (option, origin.chosen_by) == ("cpu", "auto")
    assert "no accelerator found (looked for: chip)" in str(origin)


def test_a_platform_overrides_and_says_so(tree: ConfigTree, root: Path) -> None:
    composition = tree.compose(["platform=chip"])
    option, origin = composition.choices["attention"]
    assert (option, str(origin)) == ("sdpa", f"{root}/platform/chip.yaml:3")
    assert origin.chosen_by == "platform"
    assert composition.values.name == "from-chip"
    assert composition.origins["name"].line == 8


def test_the_command_line_wins(tree: ConfigTree) -> None:
    composition = tree.compose(
        ["attention=paged", "platform=chip", "name=mine", "attention.split=8"]
    )
    option, origin = composition.choices["attention"]
    assert (option, str(origin)) == ("paged", "command line: attention=paged")
    assert composition.values.name == "mine"
    assert str(composition.origins["name"]) == "command line: name=mine"
    assert str(composition.origins["attention.split"]) == "command line: attention.split=8"


@pytest.mark.parametrize(
    "value", ["a=b", "日本", "x y", "org/Name:tag", "C:\\dir", "it's", "{brace", "[1"]
)
def test_odd_values_are_taken_verbatim(tree: ConfigTree, value: str) -> None:
    assert tree.compose([f"model.path={value}"]).values.model.path == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attention=pagd", ["no option 'pagd'", "bare, paged, sdpa", "did you mean 'paged'?"]),
        ("atention=paged", ["no such group or key 'atention'", "did you mean 'attention'?"]),
        ("attention.splt=3", ["attention has no key 'splt'", "it has split", "'split'?"]),
        ("model.nested.dept=3", ["model.nested has no key 'dept'", "did you mean 'depth'?"]),
        ("split=3", ["no such group or key 'split'; did you mean 'attention.split'?"]),
        ("nam=3", ["no such group or key 'nam'", "did you mean 'name'?"]),
        ("foo.bar=3", ["no such group or key 'foo'"]),
        ("serve", ["not an override", "key=value"]),
        ("=3", ["not an override"]),
        ("attention=paged,sdpa", ["sweep"]),
        ("attention={a:1}", ["is a group", "paged, sdpa"]),
        ("~attention", ["is a group"]),
        ("platform=chop", ["no option 'chop'", "did you mean 'chip'?"]),
        ("+attention=sdpa", ["attention"]),
    ],
)
def test_a_wrong_override_is_refused_with_the_nearest(
    tree: ConfigTree, override: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        tree.compose([override])
    for word in [override, *words] if override != "+attention=sdpa" else words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "attention.split.x=3",
            "attention.split is 512, which has no keys; give it whole: 'attention",
        ),
        ("model.path.a.b=3", "model.path is null.*whole: 'model.path={a: {b: 3}}'"),
        ("model.nested={dept:3}", "model.nested has no key 'dept'; .*did you mean 'depth'"),
        ("attention@x=sdpa", "leave the @x out"),
    ],
)
def test_a_key_below_a_plain_value(tree: ConfigTree, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^command line: '{re.escape(override)}': .*{words}"):
        tree.compose([override])


def test_a_key_of_an_option_that_is_named_within() -> None:
    for key, option in (("attention.decode", "paged"), ("ops.rms_norm", "OPTION")):
        words = f"{key} names an option.*'{key}={{_option_: {key.split('.')[0]}/{option}, foo: 3}}'"
        with pytest.raises(ConfigError, match=f"^command line: '{key}.foo=3': {words}"):
            assemble(["platform=cpu", "model=tiny", "attention=hybrid", f"{key}.foo=3"])


LISTS = {
    "platform/chip.yaml": {
        "override /atention: sdpa": r"no group 'atention'; did you mean 'attention'\?",
        "/atention: sdpa": r"no group 'atention'; did you mean 'attention'\?",
        "override attention: sdpa": "group 'platform' has no folder 'attention'; write /attention",
        "override /attention: spda": r"no option 'spda'; it has bare, .*did you mean 'sdpa'\?",
        "/attention: spda": "attention is filled already; write: override /attention: spda",
        "cpuu": r"group 'platform' has no option 'cpuu'; it has .*did you mean 'cpu'\?",
        "[a, b]": r"expected GROUP: OPTION.* got - \[a, b\]",
    },
    "attention/paged.yaml": {
        "bear": r"group 'attention' has no option 'bear'; it has .*did you mean 'bare'\?",
        "/modle: small": r"no group 'modle'; did you mean 'model'\?",
        "/model: smal": r"no option 'smal'; it has small; did you mean 'small'\?",
    },
    "config.yaml": {
        "attention: pagd": r"no option 'pagd'; .*did you mean 'paged'\?",
        "atention: paged": r"no group 'atention'; did you mean 'attention'\?",
    },
}


@pytest.mark.parametrize(("file", "entry"), [(f, e) for f, es in LISTS.items() for e in es])
def test_a_wrong_entry_of_a_defaults_list_has_its_line(root: Path, file: str, entry: str) -> None:
    """None of these is left to Hydra, whose words have no line."""
    text = f"# x\ndefaults:\n  - _self_\n  - {entry}\n_target_: a.B\n"
    if file == "platform/chip.yaml":
        text = f"# @package _global_\n{text.replace('_target_: a.B', 'name: chip')}"
    elif file == "config.yaml":
        text = FILES[file].replace("  - attention: paged", f"  - {entry}")
    write(root, {file: text})
    options = ["platform=chip"] if "chip" in file else ["platform=cpu"]
    line = text.splitlines().index(f"  - {entry}") + 1
    with pytest.raises(ConfigError) as caught:
        ConfigTree([root]).compose(options)
    assert str(caught.value).startswith(f"{root / file}:{line}: defaults: "), caught.value
    assert re.search(LISTS[file][entry], str(caught.value)), caught.value


@pytest.mark.parametrize("text", ["_target_: [a\n", "_target_: a\n_target_: b\n"])
def test_what_is_no_yaml_has_its_line(root: Path, text: str) -> None:
    write(root, {"attention/paged.yaml": text})
    for overrides in ([], ["platform=cpu"], ["attention=paged"]):
        with pytest.raises(ConfigError, match=r"attention/paged\.yaml:2: not valid YAML: "):
            ConfigTree([root]).compose(overrides)
    with pytest.raises(ConfigError, match=r"attention/paged\.yaml:2: not valid YAML: "):
        ConfigTree([root]).compose_option("attention", "paged")


def test_a_bad_manifest_hides_no_typing_error(root: Path) -> None:
    write(root, {"platform/bad.yaml": "# @package _global_\nplatform:\n  detect: [3]\n"})
    with pytest.raises(ConfigError, match=r"'platfrom=cpu': .*did you mean 'platform'"):
        ConfigTree([root]).compose(["platfrom=cpu"])
    with pytest.raises(ConfigError, match=r"bad\.yaml:3: platform.detect"):
        ConfigTree([root]).compose([])


def test_of_two_overrides_of_one_key_the_last_holds_and_a_line_says_so() -> None:
    both = ["attention=sdpa", "attention=paged"]
    assembly = assemble(["platform=cpu", "model=tiny", *both])
    assert assembly.choices["attention"].option == "paged"
    (line,) = [text for text in assembly.warnings if "twice" in text]
    assert line == (
        "command line: attention is set twice: the last, attention=paged, holds, and "
        "attention=sdpa is not used"
    )
    assert repeated(["a.b=1", "a.b=1", "a.c=2"], {}) == []
    elsewhere = {"a=1": Origin("env DI_CONFIG", text="a=1", named=True)}
    assert repeated(["a=1", "a=2"], elsewhere) == []
    assert len(repeated(["a=1", "a=2", "++a=3"], {})) == 2


def test_the_nearest_name_has_all_words() -> None:
    assert nearest("num_layers", ["layers", "num_hidden_layers"]) == (
        "; did you mean 'num_hidden_layers'?"
    )
    assert nearest("num_layrs", ["layers", "num_layers"]) == "; did you mean 'num_layers'?"


def test_a_key_of_a_part_without_keys_is_refused_with_that(tree: ConfigTree) -> None:
    with pytest.raises(ConfigError, match=r"attention has no key 'splt'; it takes no keys$"):
        tree.compose(["attention=bare", "attention.splt=3"])


def test_broken_yaml_names_the_file(root: Path) -> None:
    write(root, {"attention/paged.yaml": "_target_: [a\n"})
    with pytest.raises(ConfigError, match="paged"):
        ConfigTree([root]).compose([])


def test_two_accelerators_are_refused(root: Path, tmp_path: Path) -> None:
    write(tmp_path, {"dev/one": "", "dev/two": ""})
    for name in ("one", "two"):
        detect = f"platform:\n  name: {name}\n  detect:\n    files: [{tmp_path}/dev/{name}]\n"
        write(root, {f"platform/{name}.yaml": f"# @package _global_\n{detect}"})
    with pytest.raises(ConfigError, match=r"several platforms are here: one .*two"):
        ConfigTree([root]).compose([])
    assert ConfigTree([root]).compose(["platform=two"]).values.platform.name == "two"
    (tmp_path / "dev/two").unlink()
    assert ConfigTree([root]).compose(["platform=auto"]).values.platform.name == "one"


def test_a_broken_port_never_falls_back_to_the_cpu(root: Path) -> None:
    port = Port("mychip", "mychip", "mychip-port", None, "has no conf/ folder")
    tree = ConfigTree([root], [port])
    with pytest.raises(PortError, match=r"port 'mychip' .*mychip-port.* has no conf/ folder"):
        tree.compose([])
    assert tree.compose(["platform=cpu"]).values.platform.name == "cpu"
    with pytest.raises(ConfigError, match=r"port 'mychip' .* is installed but has no conf/"):
        tree.compose(["platform=mychip"])


def test_one_option_in_two_trees_is_refused(root: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"attention/paged.yaml": "_target_: x.Y\n"})
    tree = ConfigTree([root, other])
    with pytest.raises(PortError, match=r"attention=paged is defined twice: .*conf.* and .*other"):
        tree.compose(["platform=cpu", "attention=paged"])


def test_another_root_adds_options(root: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"attention/mine.yaml": "_target_: x.Y\nk: 1\n"})
    composition = ConfigTree([root, other]).compose(["attention=mine"])
    assert composition.values.attention.k == 1
    assert composition.origins["attention.k"].file == str(other / "attention/mine.yaml")


def test_many_threads_and_no_traces(tree: ConfigTree, tmp_path: Path) -> None:
    here = Path.cwd()
    wrong: list[object] = []

    def one(number: int) -> None:
        try:
            composition = tree.compose([f"attention.split={number}"])
            if composition.values.attention.split != number:
                wrong.append(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert Path.cwd() == here
    assert "outputs" not in os.listdir(here)


def test_texts_and_summaries(tree: ConfigTree, root: Path) -> None:
    assert tree.read(root / "attention/paged.yaml").texts == {"split": "tokens in a piece"}
    assert tree.read(root / "attention/sdpa.yaml").summary == "Plain attention."


@pytest.mark.parametrize(
    "override", ["attention=mine", "attention.prefill=mine", "ops.rms_norm=mine"]
)
def test_an_option_with_defaults_means_the_same_wherever_it_is_named(
    override: str, tmp_path: Path
) -> None:
    """In its group, as a half of attention, as the library of one op, and by ``_option_``."""
    write(
        tmp_path,
        {
            "attention/mine.yaml": "defaults: [paged, _self_]\n",
            "attention/both.yaml": (
                "_target_: vllm_di.components.attention.hybrid.HybridAttention\n"
                "prefill: {_option_: attention/mine}\ndecode: sdpa\n"
            ),
            "ops/mine.yaml": "defaults: [cpu, _self_]\nlibrary:\n  isa: generic\n",
        },
    )
    asked = ["platform=cpu", "model=tiny", override]
    if "prefill" in override:
        asked.append("attention=hybrid")
    found = assemble(asked, [tmp_path])
    check(WorkerContainer, found, replaced=GIVEN[WorkerContainer])
    (worker,) = found.stages
    plain = assemble(["platform=cpu", "model=tiny"]).stages[0]
    if override.startswith("ops"):
        assert worker["ops"]["rms_norm"] == plain["ops"]["library"] | {"isa": "generic"}
        assert found.place("ops.rms_norm.isa").endswith("ops/mine.yaml:3")
        assert found.place("ops.rms_norm.compile").startswith("conf/ops/cpu.yaml:")
    else:
        node = worker["attention"]
        assert node.get("prefill", node) == plain["attention"]
    both = assemble(["platform=cpu", "model=tiny", "attention=both"], [tmp_path])
    assert both.stages[0]["attention"]["prefill"] == plain["attention"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"x.yaml": "defaults: [pagd]\n"},
            "attention.prefill=x: attention.prefill: ",
        ),
        ({"x.yaml": "prefill: x\n"}, "names itself: options are nested more than"),
        ({"x.yaml": "inner: {_option_: atention/sdpa}\n"}, "no group 'atention'.*mean 'attention'"),
        ({"x.yaml": "inner: {_option_: attention/sdp}\n"}, "no option 'sdp'.*did you mean 'sdpa'"),
    ],
    ids=str,
)
def test_a_wrong_name_within_a_node_has_its_place(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    write(tmp_path, {f"attention/{name}": text for name, text in files.items()})
    asked = ["platform=cpu", "model=tiny", "attention=hybrid", "attention.prefill=x"]
    with pytest.raises(ConfigError, match=message):
        assemble(asked, [tmp_path])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=b", ("", "a", "=", "b")),
        ("++a.b=c=d", ("++", "a.b", "=", "c=d")),
        ("~a.b", ("~", "a.b", "", "")),
        ("", ("", "", "", "")),
    ],
)
def test_the_parts_of_an_override(text: str, parts: tuple[str, ...]) -> None:
    assert read(text) == parts


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("mtia", "install its package, or start one with vllm-di new-port"),
        ("npu", "install its package"),
        ("mlu", "install its package"),
        ("opencl", "install its package"),
        ("openvno", "did you mean 'openvino'"),
        ("asend", "did you mean 'ascend'"),
    ],
)
def test_a_platform_that_is_not_there_is_taken_for_no_other(value: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as error:
        assemble([f"platform={value}"])
    assert "it has ascend, cpu, cuda" in str(error.value)
    assert ("did you mean" in str(error.value)) == ("did you mean" in hint)


def test_one_rule_for_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model`` and ``LLM(model)``; a folder of the place is named in the error."""
    assert model_overrides("org/name") == ["model=local", "model.path=org/name"]
    assert model_overrides("x.gguf") == ["model=local", "model.path=x.gguf"]
    assert model_overrides("tiny") == ["model=tiny"]
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no option 'mine'.*--model \./mine"):
        assemble(model_overrides("mine"))


@pytest.mark.parametrize("group", ["attention", "tokenizer", "ops", "server"])
def test_an_option_read_without_hydra_is_what_hydra_makes_of_it(group: str) -> None:
    tree = ConfigTree.find()
    for option in tree.options(group):
        node, origins = tree.compose_option(group, option)
        composed, path = tree._hydra_node(group, option), tree.file(group, option)
        assert path is not None
        tree._add_ops(composed, tree.with_included(path))
        assert OmegaConf.to_container(node) == OmegaConf.to_container(composed, resolve=False)
        assert origins
