"""Every block of code of the pages has a class, and what the quick classes promise holds."""

from __future__ import annotations

import ast
import datetime
import re
import shlex
import tomllib
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from tests.docs.blocks import (
    CLASSES,
    HOW,
    ROOT,
    Block,
    blocks,
    class_of,
    commands,
    commands_that,
    data,
    how,
    within_sentences,
)
from tests.ports.packages import installed

from vllm_di import cli
from vllm_di.commands.arguments import VERBS, WITHOUT_OVERRIDES, parse
from vllm_di.components.interfaces import Placement
from vllm_di.conformance.catalog import BY_NAME
from vllm_di.conformance.report import read_waivers
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.fill import opened
from vllm_di.containers.manifest import Capabilities, CompileTargets, read_manifest
from vllm_di.containers.ports import conf_of_project
from vllm_di.containers.slots import SLOTS, WorkerContainer
from vllm_di.errors import ConfigError

THEIRS = ("mychip", "acme", "org/model", "mine", "tinygpt", "executor=ray")
"""Names of the readers' own: nothing here fills them."""
OF_A_READER = ("FOLDER", "PATH", "./", "sentence-transformers/", "cross-encoder/")
"""Paths of checkpoints that are not here."""


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """-> exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def block(page: str, begins: str) -> Block:
    found = [b for b in blocks() if b.page == page and b.begins.startswith(begins)]
    assert len(found) == 1, f"{page} has {len(found)} blocks that begin with {begins!r}"
    return found[0]


def of_language(page: str, language: str) -> list[str]:
    return [b.text for b in blocks() if (b.page, b.language) == (page, language)]


# the data


def test_every_block_has_a_class() -> None:
    lost = [f"{b.place}: {b.begins}" for b in blocks() if len({*class_of(b)} & {*CLASSES}) != 1]
    assert not lost, "give each a class in tests/docs/blocks.yaml:\n" + "\n".join(lost)


def test_every_command_says_how_it_is_run() -> None:
    lost = [f"{b.place}: {c}" for c, b in commands().items() if len({*how(c)} & {*HOW}) != 1]
    assert not lost, "say how in tests/docs/blocks.yaml:\n" + "\n".join(lost)
    unfounded = [c for c in commands_that("not") if len(how(c)["not"]) < 7]
    assert not unfounded, "say why no test runs it"


def test_every_entry_has_a_block() -> None:
    for page, entries in data()["pages"].items():
        found = [b for b in blocks() if b.page == page]
        known = {b.begins for b in found} | {f"({b.language})" for b in found}
        assert not entries.keys() - known, page
    assert not data()["commands"].keys() - commands().keys()


def test_the_tests_that_are_named_are_there() -> None:
    for each in blocks():
        if "test" not in class_of(each):
            continue
        file, _, name = class_of(each)["test"].partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        functions = {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"{each.place}: there is no {file}::{name}"
        if file.startswith("tests/ports/"):
            continue  # its messages are held against what the pages print
        assert Path(each.page).stem in text or "blocks()" in text, (
            f"{file} does not read {each.page}"
        )


# commands


def words_of(command: str) -> list[str]:
    """Without environment, path and redirections."""
    words = shlex.split(re.sub(r"\s[<>|] .*$", "", command))
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return [Path(words[0]).name, *words[1:]]


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_is_one_that_can_be_given(command: str) -> None:
    """Its verb, flags, targets and modules are there; its overrides compose, and every class and
    key that they choose is checked."""
    for part in command.split(" && "):
        program, *words = words_of(part)
        assert program in {*CHECKS, *PASSED}, f"no test knows the program {program}"
        if program in CHECKS:
            CHECKS[program](words)


def _check_verb(words: list[str]) -> None:
    verb, *rest = words
    assert verb in VERBS
    arguments = parse(verb, rest)
    if "--only" in arguments.options:
        for name in arguments.options["--only"].split():
            assert name.split("/")[0] in BY_NAME
    text = " ".join(words)
    if verb in (*WITHOUT_OVERRIDES, "vllm") or any(name in text for name in THEIRS):
        return
    if "-m" in arguments.switches:  # a value with commas is tried one by one
        arguments.overrides = [override.split(",")[0] for override in arguments.overrides]
    if any(path in text for path in OF_A_READER):  # the checkpoint is the reader's
        arguments.overrides = [o for o in arguments.overrides if not o.startswith("model")]
    explain(assemble(arguments.overrides, incomplete=True), ops=False)


def _check_target(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in words if "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:.*##", makefile, re.MULTILINE), target


def _check_requirement(words: list[str]) -> None:
    """Extras of this project are those of its pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert words[0] == "install"
    for name in re.findall(r"vllm-di\[(\w+)\]", " ".join(words)):
        assert name in extras


def _check_module(words: list[str]) -> None:
    assert words[0] == "-m"
    assert util.find_spec(words[1]), f"there is no module {words[1]}"
    for path in words[2:]:
        assert not path.startswith("tests/") or (ROOT / path).exists(), f"there is no {path}"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "vllm-di": _check_verb,
    "make": _check_target,
    "pip": _check_requirement,
    "python": _check_module,
}
PASSED = ("pytest", "vllm", "curl", "kill", "ray", "(umask", "apt-get")
"""Programs of others."""


@pytest.mark.parametrize("command", list(within_sentences()))
def test_a_command_in_a_sentence_has_a_verb_and_flags_that_are_there(command: str) -> None:
    program, *words = words_of(command)
    if program == "make":
        _check_target(words)
    elif words[0] not in ("--help", "--completion", "--version"):
        assert words[0] in VERBS
        parse(words[0], words[1:])


@pytest.mark.parametrize("command", commands_that("run"))
def test_a_quick_command_runs(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, *words = words_of(command)
    assert program == "vllm-di"
    monkeypatch.chdir(tmp_path)
    if "--reports" in words:
        Path(words[words.index("--reports") + 1]).mkdir(parents=True)
    status, out, err = call(capsys, *words)
    assert (status, "Traceback" in err) == (0, False), err
    assert out or list(tmp_path.iterdir())


# what the pages show


def test_the_drawing_of_the_readme_has_every_slot() -> None:
    text = block("README.md", "conf/*.yaml + overrides").text
    missing = [slot for slot in SLOTS if not re.search(rf"\b{slot}\b", text)]
    assert not missing


def test_explain_prints_the_rows_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """Class and who chose it; the line of a file may move."""
    first, *lines = block("README.md", "$ vllm-di explain").text.splitlines()
    status, out, _ = call(capsys, *first.split()[2:], "platform=cpu")
    assert status == 0
    printed = [line.split() for line in out.splitlines() if line.strip()]
    rows = [line.split() for line in lines if re.match(r"[a-z_]+ {2,}", line)]
    assert len(rows) > 8
    for row in rows:
        if row[0] in SLOTS:
            assert any(row[:3] == each[:3] for each in printed), row
        elif row[0] not in ("slot", "op"):
            assert any(row[0] == each[0] for each in printed), row


@pytest.mark.parametrize(
    "each",
    [
        b
        for b in blocks()
        if class_of(b).get("test", "").endswith("test_a_platform_of_the_page_composes")
    ],
    ids=lambda each: each.place,
)
def test_a_platform_of_the_page_composes(each: Block, tmp_path: Path) -> None:
    """As conf/platform/mine.yaml of a folder of the reader's: README.md, docs/clusters.md,
    docs/configuration.md. What the block leaves to the reader is put in."""
    text = each.text.replace("NAME", "mine")
    text = text.replace("mypackage.executor.PrefillDecode", "tests.containers.two_roles.TwoRoles")
    content = yaml.safe_load(text)
    if "platform" not in content:
        text = f"# @package _global_\n{text}\nplatform:\n  name: mine\n  level: declared\n"
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform/mine.yaml").write_text(text)
    small = ["model=smollm2", "trust=[tests]"]  # the demo's model has the layers that the pages cut
    found = assemble(["platform=mine", *small], [tmp_path])
    shown = explain(found, config_dirs=[tmp_path], ops=False)
    assert shown.platform == "mine"
    assert [len(stages) for stages in found.workers.values()] == [
        len(stages) for stages in (content.get("workers") or {"": content.get("stages")}).values()
    ]


def test_errors_are_as_the_page_shows_them(tmp_path: Path) -> None:
    """docs/configuration.md; what a line cuts with … is a part of what is said."""
    from vllm_di.parts import assemble_parts

    shown = block("docs/configuration.md", "command line: 'atention=sdpa'").text.splitlines()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/mine.yaml").write_text(
        "\ndefaults: [continuous, _self_]\n\nmax_num_seqs: many\n"
    )
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform/mine.yaml").write_text(
        "# @package _global_\n\ndefaults:\n  - override /attention: spda\n"
        "platform: {name: mine, level: declared}\n"
    )
    tries = (["atention=sdpa"], ["scheduler=mine"], ["kv_layout=nhd"], ["platform=mine"])
    assert len(shown) == len(tries)
    for line, overrides in zip(shown, tries, strict=True):
        with pytest.raises(ConfigError) as caught:
            _start(["platform=cpu", "model=tiny", *overrides], tmp_path)
        _says(str(caught.value).replace(str(tmp_path), "conf"), line)
    with pytest.raises(ConfigError) as caught:
        assemble_parts([("attention=sdap", "env DI_CONFIG")], platform="cpu")
    _says(str(caught.value), block("docs/configuration.md", "env DI_CONFIG").text)


def _start(overrides: list[str], folder: Path) -> None:
    """As far as the constructors of attention and what it needs."""
    assembly = assemble(overrides, [folder])
    explain(assembly, config_dirs=[folder], ops=False)
    with opened(WorkerContainer, assembly, placement=Placement(), only=["attention"]):
        pass


def _says(message: str, shown: str) -> None:
    pattern = ".*".join(re.escape(part) for part in re.split(r",? ?…,? ?", shown))
    assert re.search(pattern, message, re.DOTALL), f"{message}\nis not\n{shown}"


def test_the_waiver_of_the_page_is_read(tmp_path: Path) -> None:
    """docs/conformance.md"""
    text = block("docs/conformance.md", "- {id").text
    (tmp_path / "waivers.yaml").write_text(text)
    expires = yaml.safe_load(text)[0]["expires"]
    (waiver,) = read_waivers(tmp_path / "waivers.yaml", expires - datetime.timedelta(days=30))
    assert waiver.id.split("/")[0] in BY_NAME


def test_manifests_of_the_pages_are_read() -> None:
    """docs/interface-versions.md and docs/conformance.md: a node that stands by itself, and a part
    of one."""
    (text,) = of_language("docs/interface-versions.md", "yaml")
    node = yaml.safe_load(text)["platform"]
    assert read_manifest(node, "mychip", str, out_of_tree=True).interface == "2.0"
    part = yaml.safe_load(block("docs/conformance.md", "platform:").text)["platform"]
    targets = msgspec.convert(part["compile"], CompileTargets)
    module, _, name = targets.by.rpartition(".")
    assert hasattr(__import__(module, fromlist=[name]), name)


def test_the_port_of_the_page_is_found_and_checked(tmp_path: Path) -> None:
    """docs/writing-a-component.md: the class with its methods left out is refused for that alone;
    option, key and manifest are taken."""
    page = "docs/writing-a-component.md"
    (source,) = of_language(page, "python")
    attention, platform = of_language(page, "yaml")
    (entry,) = of_language(page, "toml")
    assert tomllib.loads(entry)["project"]["entry-points"]["vllm_di.ports"] == {"mychip": "mychip"}
    device = (conf_of_project() / "device/host.yaml").read_text(encoding="utf-8")
    files = {
        "mychip/__init__.py": "",
        "mychip/attention.py": source,
        "mychip/conf/attention/mychip.yaml": attention,
        "mychip/conf/platform/mychip.yaml": platform,
        "mychip/conf/device/mychip.yaml": device,  # the page names it and leaves it out
    }
    with installed(tmp_path, files):
        found = assemble(["platform=mychip", "model=tiny", "attention.tokens_per_split=256"])
        assert found.platform.capabilities == msgspec.convert(
            yaml.safe_load(platform)["platform"]["capabilities"], Capabilities
        )
        assert found.stages[0]["attention"]["tokens_per_split"] == 256
        with pytest.raises(
            ConfigError, match="MyAttention implements AttentionBackend only in part"
        ):
            explain(found, ops=False)


def test_the_kernel_of_the_how_to_is_chosen_and_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/howto/add-a-kernel.md: its three commands, with the package installed as a port."""
    page = "docs/howto/add-a-kernel.md"
    (source,), (option,) = of_language(page, "python"), of_language(page, "yaml")
    lines = block(page, "vllm-di serve ops=mychip").text.splitlines()
    tried = [shlex.split(line.partition("#")[0])[1:] for line in lines]
    assert [words[0] for words in tried] == ["serve", "serve", "explain"]
    files = {
        "mychip/__init__.py": "",
        "mychip/ops.py": source,
        "mychip/conf/ops/mychip.yaml": option,
    }
    with installed(tmp_path, files):
        for _, *overrides in tried:
            status, out, err = call(capsys, "explain", "platform=cpu", "model=tiny", *overrides)
            assert status == 0, err
            assert re.search(r"^silu_and_mul +MyChipOps$", out, re.MULTILINE), out


def test_the_blocks_about_tests_run(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/testing.md, with sdpa in the place of the reader's attention."""
    from vllm_di.components.attention.sdpa import SdpaAttention

    class Fake(SdpaAttention):
        def __init__(self) -> None:
            """Without a layout: the block loads, and runs no step."""

    first, second = of_language("docs/testing.md", "python")
    names: dict[str, Any] = {}
    exec(compile(first.replace("attention=mychip", "attention=sdpa"), "testing.md", "exec"), names)
    names["test_my_attention_is_used"]()
    assert capsys.readouterr().out
    exec(compile(second, "testing.md", "exec"), {"Fake": Fake})
