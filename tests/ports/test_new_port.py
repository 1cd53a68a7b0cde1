"""``vllm-di new-port``: from an empty folder, with nothing but the built wheel, to a port that
answers on a simulated device and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.ports.packages import installed

from vllm_di import cli
from vllm_di.commands.arguments import VERBS, WITHOUT_OVERRIDES, WORDS, UsageError
from vllm_di.commands.new_port import check_name, write_port
from vllm_di.conformance.matrix import Matrix
from vllm_di.containers.ports import Port, conf_of_project
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import VllmDiError

ROOT = Path(__file__).parents[2]
PIP = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
PIP += ["--no-index", "--no-build-isolation"]


def python(folder: Path, *arguments: str, path: Path | str | None = None) -> str:
    """Run it in ``folder`` with ``path`` alone before the installed packages."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, then the scaffold ``acme`` and a ``site`` with it and the wheel."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("empty")
    site = tmp_path_factory.mktemp("site")
    python(ROOT, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels))
    python(wheels, *PIP, "--target", str(site), *map(str, wheels.glob("*.whl")))
    python(folder, "-m", "vllm_di.cli", "new-port", "acme", path=site)
    python(folder, *PIP, "--target", str(site), "./vllm-di-acme")
    (folder / "site").symlink_to(site)
    return folder


def test_its_own_tests_pass(folder: Path) -> None:
    port, site = folder / "vllm-di-acme", folder / "site"
    found = python(folder, "-c", "import vllm_di; print(vllm_di.__file__)", path=site)
    assert found.startswith((str(site), str(site.resolve())))
    python(port, "-m", "pytest", "-q", "-p", "no:cacheprovider", path=site)


def test_it_answers_as_the_reference_does(folder: Path) -> None:
    asked = ["-m", "vllm_di.cli", "complete", "hello", "model=tiny", "model.dtype=float32"]
    site, more = folder / "site", ["--max-tokens", "8"]
    simulated = python(folder, *asked, *more, "platform=acme", "device.simulated=true", path=site)
    assert simulated == python(folder, *asked, *more, "platform=cpu", "ops=torch", path=site)


def test_a_name_that_torch_keeps_is_simulated_under_another(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``torch.mtia`` is the real device's, so that the simulated one is ``sim_mtia``."""
    site, more = folder / "site", tmp_path_factory.mktemp("more")
    python(folder, "-m", "vllm_di.cli", "new-port", "mtia", path=site)
    python(folder, *PIP, "--target", str(more), "./vllm-di-mtia")
    both = f"{more}{os.pathsep}{site}"
    asked = ["-m", "vllm_di.cli", "complete", "hello", "model=tiny", "model.dtype=float32"]
    asked += ["--max-tokens", "8"]
    simulated = python(folder, *asked, "platform=mtia", "device.simulated=true", path=both)
    assert simulated == python(folder, *asked, "platform=cpu", "ops=torch", path=site)


def test_the_matrix_shows_it_beside_the_platforms_of_the_wheel(folder: Path) -> None:
    text = python(folder, "-m", "vllm_di.cli", "matrix", "--json", path=folder / "site")
    found = {c.name: c for c in msgspec.json.decode(text, type=Matrix).platforms}
    assert (found["acme"].level, found["acme"].evidence) == ("declared", [])
    assert [Path(run.file).name for run in found["cpu"].evidence] == ["cpu.json"]


def test_without_its_driver_it_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(AssertionError, match="the package torch_acme is not installed; install"):
        python(folder, "-m", "vllm_di.cli", "complete", "x", "platform=acme", path=folder / "site")


def commands() -> list[list[str]]:
    tree = ConfigFiles([conf_of_project()])
    acme = ["platform=acme", "device.simulated=true", "model=tiny", "model.dtype=float32"]
    found = [[verb, "--help"] for verb in VERBS]
    found += [[v, w, "--help"] for v, w in WORDS.items() if w.isidentifier()]
    found += [["help", group] for group in tree.groups()]
    found += [["help", "ops=acme"], ["help", "platform=acme"], ["matrix"], ["explain", *acme]]
    found += [["config", "show", *acme, "--origins"], ["explain", "--slot", "ops"]]
    sizes = ["--input-len", "4", "--output-len", "2", "--repeats", "1", "--warmup", "1"]
    return [
        *found,
        ["complete", "x", *acme, "--max-tokens", "2"],
        ["bench", "latency", *acme, *sizes],
    ]


def test_every_command_runs_where_a_scaffolded_port_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And each verb's ``--help`` speaks of that verb."""
    port = tmp_path / "port"
    files = {str(f.relative_to(port)): f.read_text() for f in write_port("acme", port)}
    files = {name: text for name, text in files.items() if name.startswith("acme/")}
    with installed(tmp_path, files, name="vllm_di_acme", port="acme"):
        for words in commands():
            with pytest.raises(SystemExit) as ended:
                cli.main(words)
            out, err = capsys.readouterr()
            assert (ended.value.code, "Traceback" in err) == (0, False), (words, err)
            if words[-1] == "--help" and words[0] != "help":
                assert out.startswith(f"vllm-di {words[0]} "), words
                assert VERBS[words[0]] in out
                assert ("group=option" in out) == (words[0] not in WITHOUT_OVERRIDES)
            if words == ["help", "ops=acme"]:
                assert "ops.rms_norm" in out, "the keys that it shares with ours"


def test_a_vendor_writes_less_than_300_lines(tmp_path: Path) -> None:
    files = write_port("acme", tmp_path / "port")
    own = [f for f in files if f.suffix in (".py", ".yaml", ".toml", ".yml")]
    assert sum(len(f.read_text().splitlines()) for f in own) < 300
    left = [f for f in files if "NAME" in str(f) or "$name" in f.read_text()]
    assert left == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        write_port("acme", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Acme", "expected a name for a Python package"),
        ("my-chip", "expected a name for a Python package"),
        ("class", "expected a name for a Python package"),
        ("../x", "expected a name for a Python package"),
        ("", "expected a name for a Python package"),
        ("json", "a module of Python's own library"),
        ("cpu", "torch has a device of this name, no accelerator"),
        ("meta", "torch has a device of this name, no accelerator"),
        ("xpu", "there is platform=xpu already"),
        ("auto", "a meaning of its own"),
        ("tests", "a meaning of its own"),
        ("host", "there is device=host already"),
        ("torch", "there is ops=torch already"),
        ("msgspec", "a package of this name is installed"),
        ("vllm_di", "a package of this name is installed"),
        ("chip", "taken by the installed port chip-port"),
    ],
)
def test_a_name_that_cannot_be(name: str, why: str) -> None:
    tree = ConfigFiles.find()
    tree.ports.append(Port("chip", "chip_package", "chip-port", None, "broken"))
    with pytest.raises(VllmDiError, match=why):
        check_name(name, tree)
