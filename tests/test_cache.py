"""Every writer of the cache, under everything that can befall what it wrote."""

from __future__ import annotations

import ast
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.checkpoints import make
from tests.models.gguf_files import write

from vllm_di import cache
from vllm_di.cache import SEAL, foreign_folder, is_whole, obtain, user_cache
from vllm_di.components.loader.gguf import GgufLoader
from vllm_di.components.ops.cpu_paths import ROWS, Candidate, measured, place
from vllm_di.errors import CheckpointError
from vllm_di.kernels import build as kernels
from vllm_di.kernels.simulated import build as simulated
from vllm_di.models import checkpoint

SOURCE = Path(cache.__file__).parent
CODE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 7; }\n'
Use = Callable[[Path], None]
"""Runs a writer on a cache folder and checks what comes of it."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    make("llama_gqa_tied", folder)
    return write(folder, tmp_path / "model.gguf")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small source instead of all, to be quick."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text(CODE)
    monkeypatch.setattr(kernels, "SOURCES", folder)
    monkeypatch.setattr(simulated, "SOURCES", folder)


@pytest.fixture
def quick_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config and a tokenizer, without transformers; the real conversion has tests elsewhere."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[-1])
        try:
            (folder / "config.json").write_text('{"a": 1}')
            (folder / "tokenizer.json").write_text("{}" * 4000)
        except OSError as error:
            return subprocess.CompletedProcess(command, 4, str(error), "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(checkpoint, "subprocess", SimpleNamespace(run=run))


def use_kernels(folder: Path) -> None:
    assert kernels.build("generic", folder, None).library.answer() == 7


def use_simulated(folder: Path) -> None:
    assert simulated.load(folder).answer() == 7


def use_prebuilt(folder: Path) -> None:
    """Found whole, or not used at all."""
    name = f"cpu-generic-{kernels._sources()}.so"
    obtain(folder / name, lambda to: kernels.compile_sources(to, ["g++", "-fPIC"], "-fopenmp"))
    built = kernels.prebuilt("generic", folder)
    assert built is not None and built.library.answer() == 7


class Weights:
    """A model that takes what it is given."""

    dtype = torch.float32
    takes_quantized = False

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.taken = {name: tensor.clone() for name, tensor in weights}


def use_weights(file: Path) -> Use:
    def load(folder: Path | None) -> dict[str, torch.Tensor]:
        model: Any = Weights()
        GgufLoader(path=str(file), cache=str(folder) if folder else None, progress=False).load(
            model
        )
        taken: dict[str, torch.Tensor] = model.taken
        return taken

    want = load(None)

    def use(folder: Path) -> None:
        found = load(folder)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)

    return use


def use_conversion(file: Path) -> Use:
    def use(folder: Path) -> None:
        found = checkpoint.describe(str(file), cache_dir=folder)
        assert found.hf_config == {"a": 1}
        assert (Path(found.tokenizer) / "tokenizer.json").stat().st_size == 8000

    return use


def use_openvino(folder: Path) -> None:
    """As device.py uses it, with a model of one addition."""
    ov = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    x = ops.parameter([4], np.float32, name="x")
    y = ops.add(x, ops.constant(np.arange(4, dtype=np.float32), name="c"), name="y")
    model = ov.Model([ops.result(y, name="z")], [x], "same in each run")
    core = ov.Core()
    with foreign_folder(folder) as kept:
        options = {} if kept is None else {"CACHE_DIR": str(kept)}
        compiled = core.compile_model(model, "CPU", options)
    assert compiled([np.ones(4, np.float32)])[0].tolist() == [1, 2, 3, 4]


def use_xla(folder: Path) -> None:
    """As program.py uses it, with a program of one addition."""
    jax = pytest.importorskip("jax")
    from vllm_di.ports.tpu.kept import kept_programs

    with kept_programs(jax, str(folder)):
        assert int(jax.jit(lambda x: x + 1).lower(1).compile()(1)) == 2


def use_steps(folder: Path) -> None:
    """As program.py uses it, with a program of one addition."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("flatbuffers")
    from vllm_di.ports.tpu.kept import KeptSteps

    kept = KeptSteps(
        jax, str(folder), "key", backend="cpu", num_chips=1, write=lambda *_given: None
    )
    given = np.ones(2, np.float32)
    lowered = kept.lowered(jax.jit(lambda x: x + 1), "step", (), [given])
    assert lowered.compile()(given).tolist() == [2, 2]


def use_paths(folder: Path) -> None:
    """As cpu.py uses it, with a product that takes no time to speak of."""

    def candidates() -> list[Candidate]:
        return [Candidate("float32", "own", lambda rows: sum(range(100)))]

    found = measured(place(folder, "kernels.so"), candidates, threads=1)
    assert [figure.rows for figure in found.figures] == [*ROWS]


WRITERS = {
    "kernels/build.py": "kernels",
    "kernels/build.py:prebuilt": "prebuilt",
    "kernels/simulated/build.py": "simulated",
    "components/loader/gguf.py": "weights",
    "components/ops/cpu_paths.py": "paths",
    "models/checkpoint.py": "conversion",
    "ports/openvino/device.py": "openvino",
    "ports/tpu/kept.py": "xla",
    "ports/tpu/kept.py:steps": "steps",
}


@pytest.fixture(params=WRITERS.values())
def use(request: pytest.FixtureRequest) -> Use:
    plain = {
        "kernels": use_kernels,
        "prebuilt": use_prebuilt,
        "simulated": use_simulated,
        "openvino": use_openvino,
        "paths": use_paths,
        "xla": use_xla,
        "steps": use_steps,
    }
    if request.param in ("kernels", "prebuilt", "simulated"):
        request.getfixturevalue("sources")
        return plain[request.param]
    if request.param in ("openvino", "paths", "xla", "steps"):
        return plain[request.param]
    request.getfixturevalue("quick_conversion")
    file = request.getfixturevalue("file")
    return use_weights(file) if request.param == "weights" else use_conversion(file)


def test_no_writer_is_left_out() -> None:
    """Whoever names the user's cache folder or one of the three ways to write stands in WRITERS."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            and node.module in ("vllm_di.cache", "vllm_di.kernels.build")
            for alias in node.names
        }
        if names & {"obtain", "foreign_folder", "load_library"}:
            found.add(str(path.relative_to(SOURCE)))
        if path.name != "cache.py":
            assert 'XDG_CACHE_HOME",' not in path.read_text(encoding="utf-8"), path
    assert found == {name.partition(":")[0] for name in WRITERS}


def entries(folder: Path) -> list[Path]:
    return sorted(p.with_name(p.name.removesuffix(SEAL)) for p in folder.rglob(f"*{SEAL}"))


def a_file_of(entry: Path) -> Path:
    return max(entry.iterdir(), key=lambda p: p.stat().st_size) if entry.is_dir() else entry


def _unmapped(entry: Path) -> None:
    """Files of their own in place of those that this process has mapped."""
    for path in [entry] if entry.is_file() else [p for p in entry.iterdir() if p.is_file()]:
        copy = path.with_name(".copy")
        shutil.copyfile(path, copy)
        os.replace(copy, path)


def cut(entry: Path) -> None:
    path = a_file_of(entry)
    os.truncate(path, path.stat().st_size // 2)


def flip(entry: Path) -> None:
    path = a_file_of(entry)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(entry: Path) -> None:
    a_file_of(entry).write_bytes(b"")


def other_kind(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry)
        entry.write_text("a file")
    else:
        entry.unlink()
        entry.mkdir()
        (entry / "something").write_text("in the way")


def no_seal(entry: Path) -> None:
    entry.with_name(entry.name + SEAL).unlink()


def bad_seal(entry: Path) -> None:
    entry.with_name(entry.name + SEAL).write_text('{"version": 1, "files": []}')


def folder_for_a_seal(entry: Path) -> None:
    no_seal(entry)
    entry.with_name(entry.name + SEAL).mkdir()


FAULTS = [cut, flip, empty, other_kind, no_seal, bad_seal, folder_for_a_seal]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_made_anew(
    use: Use, fault: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    use(folder)
    made = entries(folder)
    assert made and all(is_whole(entry) for entry in made)
    use(folder)
    assert caplog.text == ""
    for entry in made:
        _unmapped(entry)
        fault(entry)
        use(folder)
        assert f"{entry}: " in caplog.text and "made anew" in caplog.text
        assert is_whole(entry)
        caplog.clear()
    use(folder)
    assert caplog.text == ""
    assert not list(folder.rglob(".making-*"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, of a few pages or one that cannot be written."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may mount no file system")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("options", ["ro", "size=4k"])
def test_a_folder_that_cannot_be_written(
    use: Use,
    options: str,
    disk: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    """It works without, and says so, or it is an error that says what to do."""
    folder = disk(options)
    which = request.node.callspec.params["use"]
    if which == "prebuilt":
        with pytest.raises((OSError, kernels.BuildError)):
            use(folder)
        return
    if which == "conversion":
        with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
            use(folder)
        return
    use(folder)
    assert entries(folder) == []
    if which == "kernels":
        assert "this process alone" in kernels.build("generic", folder, None).note
    else:
        assert str(folder) in caplog.text


def test_a_cache_that_can_only_be_read_is_read(
    use: Use, disk: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = disk("size=64m")
    use(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    caplog.clear()
    use(folder)
    if use not in (
        use_openvino,
        use_xla,
    ):  # which write by themselves: they get none that they cannot write
        assert caplog.text == ""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".making-a-1").mkdir()
    (tmp_path / ".a.lock").mkdir()
    obtain(tmp_path / "a", lambda to: to.write_text("x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.lock", "a", f"a{SEAL}"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(to: Path) -> None:
        to.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        obtain(tmp_path / "a", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".a.lock"]


def test_parts_of_a_long_file_are_hashed_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART", 1000)
    entry = obtain(tmp_path / "a", lambda to: to.write_bytes(bytes(range(250)) * 41))
    assert is_whole(entry)
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    assert not is_whole(entry)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        user_cache()
    with pytest.raises(kernels.BuildError, match="set XDG_CACHE_HOME"):
        kernels.default_cache()


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
