"""The command line as a user meets it: answers, errors, exit statuses, what it must not import."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_di.cli import main
from vllm_di.commands.arguments import UsageError, parse
from vllm_di.commands.bench import points
from vllm_di.commands.completion import candidates
from vllm_di.conformance.catalog import CHECKS

TINY = ["platform=cpu", "model=tiny", "ops=torch", "model.dtype=float32"]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """-> exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_help_lists_verbs_groups_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        status, out, _ = call(capsys, *words)
        assert status == 0
        for word in ("serve", "explain", "attention", "paged, sdpa", "--port", "server.port"):
            assert word in out


def test_help_of_a_group_has_each_keys_text(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "serve", "--help", "scheduler=continuous")
    assert status == 0
    assert "scheduler.max_num_seqs" in out
    assert "most sequences that run at once" in out
    assert call(capsys, "help", "attenton")[0] == 2


def test_every_key_of_every_option_has_a_text() -> None:
    from vllm_di.containers.tree import ConfigFiles

    tree = ConfigFiles.find()
    silent = []
    for group in tree.groups():
        for path in {*tree.options(group).values(), *tree.roots[0].glob(f"{group}/base.yaml")}:
            file = tree.read(path)
            shared = path.parent / "base.yaml"
            texts = file.texts | (tree.read(shared).texts if shared.is_file() else {})
            parents = {key.rpartition(".")[0] for key in file.lines}
            for key in file.lines:
                above = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]
                known = key in parents or key.split(".")[-1] == "_target_"
                if not known and not any(k in texts for k in above):
                    silent.append(f"{group}/{path.stem}: {key}")
            assert file.summary, f"{group}/{path.stem} has no summary"
    assert silent == []


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["srve"], 2, "did you mean 'serve'"),
        (["serve", "--prot", "80"], 2, "did you mean '--port'"),
        (["serve", "--port"], 2, "--port needs a value"),
        (["serve", "llama3"], 2, "'llama3' is no override"),
        (["explain", "atention=sdpa"], 2, "did you mean 'attention'"),
        (["explain", "attention=pagd"], 2, "did you mean 'paged'"),
        (["explain", *TINY, "scheduler.max_num_seqs=many"], 2, "Expected `int`"),
        (["explain", *TINY, "server.port=70000"], 2, "<= 65535"),
        (["explain", *TINY, "+attention.x=3"], 2, "takes no keys"),
        (["explain", *TINY, "attention._target_=os.system"], 2, "'os.system' is refused"),
        (["complete", "hi", "model=llama3"], 2, "model.path="),
        (["explain", "model=llama3", "tokenizer.path=3"], 2, "Expected `str"),
        (["explain", "model=local", "model.path=/nope"], 1, "no such file or folder"),
        (["complete", "hi", *TINY, "worker.num_blocks=1"], 2, "room for 1 block "),
        (["complete", "hi", *TINY, "model.dtype=int8"], 2, "bfloat16"),
        (["complete", "hi", *TINY, "--temperature", "-3"], 2, "--temperature"),
        (["bench", "sideways"], 2, "latency|throughput|serve"),
        (["config", "hide"], 2, "config show"),
        (["--completion", "tcsh"], 2, "bash, zsh, fish"),
        (["explain", "--slot", "attenton"], 2, "did you mean 'attention'"),
        (["explain", "--config-dir", "/nope"], 2, "no such folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_a_mistake_is_answered_in_one_message(
    words: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, _, err = call(capsys, *words)
    assert got == status
    assert text in err
    assert "Traceback" not in err
    assert err.startswith("vllm-di: ")


def test_aliases_are_overrides() -> None:
    found = parse("serve", ["--port", "80", "--host=::1", "--model", "a/b", "x=1", "--debug"])
    assert found.overrides == [
        "server.port=80",
        "server.host=::1",
        "model=local",
        "model.path=a/b",
        "x=1",
    ]
    assert found.switches == {"--debug"}
    two = parse("serve", ["--model", "llama3", "--tensor-parallel-size=2"]).overrides
    assert two == ["model=llama3", "executor=multiprocess", "executor.tensor_parallel_size=2"]
    with pytest.raises(UsageError, match="1 or more"):
        parse("bench", ["--repeats", "0"]).number("--repeats", 1)


def test_explain_as_data_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "explain", "--json", *TINY, "attention=sdpa")
    assert status == 0
    rows = {row["slot"]: row for row in json.loads(out)["rows"]}
    assert rows["attention"]["target"].endswith("sdpa.SdpaAttention")
    assert rows["attention"]["chosen_by"] == "command line"
    assert "paged" in rows["attention"]["alternatives"]
    assert rows["loader"]["place"] == "conf/model/tiny.yaml:4"
    status, out, _ = call(capsys, "explain", *TINY, "attention=sdpa")
    assert status == 0
    assert "command line: attention=sdpa" in out
    assert "fusions in force" in out
    status, out, _ = call(capsys, "explain", "--slot", "attention")
    assert "paged" in out
    assert "scaled dot product" in out


@pytest.mark.parametrize(
    ("model", "waiting"),
    [
        ("llama3", {"loader", "tokenizer", "chat_template"}),
        ("local", {"loader", "tokenizer", "chat_template", "model"}),
    ],
)
def test_explain_says_in_its_row_what_is_missing(
    model: str, waiting: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No weights, and no driver of the hardware: the other rows are there all the same."""
    words = ["platform=ascend", f"model={model}"]
    status, out, err = call(capsys, "explain", "--json", *words)
    assert (status, err) == (0, "")
    rows = {row["slot"]: row for row in json.loads(out)["rows"]}
    missing = {slot: row["missing"] for slot, row in rows.items() if row["missing"]}
    assert missing.keys() == waiting | {"device"}
    assert missing["loader"].startswith("missing: model.path; set it to ")
    assert "torch_npu is not installed" in missing["device"]
    assert len(rows) == 31
    assert rows["attention"]["target"].startswith("vllm_di.ports.ascend.")
    status, out, _ = call(capsys, "explain", "--no-ops", *words)
    assert status == 0
    assert "missing: model.path" in out
    status, out, _ = call(capsys, "config", "show", *words)
    assert status == 0
    assert 'weights: "missing: model.path; set it to ' in out


def test_explain_compiles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = f"ops.library.cache={tmp_path / 'kernels'}"
    found = ["platform=cpu", "model=tiny", "ops=cpu", cache]
    status, out, _ = call(capsys, "explain", "--json", *found)
    assert status == 0
    runs = {row["op"]: row["runs_on"] for row in json.loads(out)["ops"]}
    assert "will be compiled at the first start" in runs["linear"]
    assert "fp16: torch" in runs["linear"]
    assert not list(tmp_path.rglob("*.so"))


def test_conform_lists_its_checks(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "conform", "--list")
    assert status == 0
    assert [row.split()[1] for row in out.splitlines()[2:]] == [check.name for check in CHECKS]


def test_config_show_masks_secrets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    group = tmp_path / "server"
    group.mkdir()
    text = "_target_: vllm_di.server.app.OpenAiServer\napi_key: hunter2  # a secret\n"
    (group / "leaky.yaml").write_text(text)
    words = ["config", "show", *TINY, "server=leaky", "--config-dir", str(tmp_path), "--origins"]
    status, out, _ = call(capsys, *words)
    assert status == 0
    assert "hunter2" not in out
    assert 'api_key: "********"' in out
    assert f"{group}/leaky.yaml:2" in out
    assert "  # command line: model=tiny" not in out


def test_config_show_masks_secrets_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What is declared secret, wherever it stands; no number for its name."""
    (tmp_path / "server").mkdir()
    text = (
        "_target_: vllm_di.server.app.OpenAiServer\n"
        "licence: abc-1  # secret: what the vendor sold\n"
        "peers: [{password: abc-2}]  # others\n"
    )
    (tmp_path / "server" / "leaky.yaml").write_text(text)
    words = ["config", "show", *TINY, "server=leaky", "--config-dir", str(tmp_path), "--origins"]
    _, out, _ = call(capsys, *words, "+server.api_key=abc-3", "+server.hf_token=abc-4")
    assert "abc-" not in out
    assert out.count('"********"') == 4
    _, plain, _ = call(capsys, "config", "show", *TINY)
    assert "****" not in plain
    assert "max_num_batched_tokens: 512" in plain
    assert "max_tokens" in plain


def test_complete_and_chat_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    status, out, _ = call(capsys, "complete", "hello", *TINY, "--max-tokens", "4")
    assert status == 0
    assert out.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/new\nagain\n/quit\n"))
    status, out, err = call(capsys, "chat", *TINY, "--max-tokens", "4", "platform.level=declared")
    assert status == 0
    assert "platform cpu: declared (not hardware-tested)" in err
    assert len(out.splitlines()) >= 2


def test_bench_measures_and_sweeps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ["--input-len", "8", "--output-len", "3", "--repeats", "1", "--warmup", "1"]
    path = tmp_path / "out.json"
    status, out, _ = call(capsys, "bench", "latency", *TINY, *sizes, "--json", str(path))
    assert status == 0
    assert "decode, tokens/s" in out
    assert json.loads(path.read_text())["runs"]["first token, s"][0] > 0
    sweep = ["bench", "throughput", "-m", *TINY, *sizes, "--num-prompts", "2"]
    status, out, err = call(capsys, *sweep, "attention=sdpa,paged,nope")
    assert status == 0
    assert "attention=paged" in out
    assert "attention=nope failed" in err


def test_points_of_a_sweep() -> None:
    assert points(["a=x,y", "b=1", "c='p,q'"]) == [
        ["a=x", "b=1", "c='p,q'"],
        ["a=y", "b=1", "c='p,q'"],
    ]


def test_completion_candidates() -> None:
    assert candidates(["se"]) == ["serve"]
    assert candidates(["serve", "atten"]) == ["attention=", "attention."]
    assert {"attention=paged", "attention=sdpa"} <= {*candidates(["serve", "attention="])}
    assert "scheduler.max_num_seqs=" in candidates(["serve", "scheduler.max"])
    assert "--port" in candidates(["serve", "--p"])


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["help", "attention"], ["--version"], ["__complete", "serve", "attention="]],
    ids=" ".join,
)
def test_the_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom vllm_di.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'hydra', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, vllm_di\nassert not {'torch', 'hydra', 'msgspec'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_api_process_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "import vllm_di.commands.serve\n"
        "from vllm_di.containers.assembly import assemble\n"
        "from vllm_di.containers.slots import GIVEN, ServerContainer\n"
        "from vllm_di.containers.schema import check\n"
        "a = assemble(['platform=cpu', 'model=tiny'])\n"
        "check(ServerContainer, a, replaced=GIVEN[ServerContainer])\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_of_the_cpu_imports_no_compiler_of_torch() -> None:
    """Half a second, and 900 modules in memory for good."""
    code = (
        "import sys\n"
        "from vllm_di import LLM, SamplingParams\n"
        "with LLM(overrides=['platform=cpu', 'model=tiny']) as llm:\n"
        "    llm.generate(['a'], SamplingParams(max_tokens=2))\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'sympy', 'triton', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_taken_address_is_noticed_before_the_engine_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr("vllm_di.server.engine_client.ProcessEngineClient.start", start)
    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        port = taken.getsockname()[1]
        for override in (f"server.port={port}", f"server.unix_socket={path}"):
            status, out, error = call(capsys, "serve", *TINY, override)
            assert (status, out) == (2, "")
            (line,) = error.strip().splitlines()
            assert override in line


@pytest.mark.parametrize("words", ["help", "help attention", "matrix", "explain model=tiny", "é"])
def test_a_terminal_that_knows_only_ascii(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, "ascii", write_through=True))
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == (2 if words == "é" else 0)
    assert raw.getvalue().isascii()
    assert raw.getvalue()
