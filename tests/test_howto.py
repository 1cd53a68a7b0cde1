"""The examples of the how-to pages do what the pages say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.checkpoints import SHAPE

from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.conformance.checks.test_ops import compare
from vllm_di.conformance.interface_record import Change, changes, record
from vllm_di.conformance.op_cases import cases
from vllm_di.containers.assembly import assemble
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.slots import EngineContainer
from vllm_di.errors import ConfigError, RequestError, UnsupportedModelError
from vllm_di.models import hf_config, hf_settings

ROOT = Path(__file__).parents[1]
HOWTO = ROOT / "docs/howto"


def blocks(page: str, language: str) -> list[str]:
    text = (HOWTO / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def module(source: str, **names: Any) -> dict[str, Any]:
    """What the source defines."""
    namespace: dict[str, Any] = {"__name__": "howto", **names}
    exec(compile(source, "howto", "exec", dont_inherit=True), namespace)
    return namespace


OP_FILES = {
    "src/vllm_di/components/interfaces/ops.py": '    @OPS.op("residual add',
    "src/vllm_di/conformance/op_cases.py": '@cases_of("add_rms_norm")',
    "src/vllm_di/components/ops/traced.py": "    def rotary_embedding(",
}
"""Before which line each block of the page goes."""


def test_an_op_is_added_in_three_files(tmp_path: Path) -> None:
    """In a copy of the project: it is chosen on the command line, explained, and judged."""
    pieces = blocks("add-an-op.md", "python")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("src", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for (file, before), piece in zip(OP_FILES.items(), pieces, strict=True):
        assert f"`{file}`" in (HOWTO / "add-an-op.md").read_text()
        text = (tmp_path / file).read_text()
        assert text.count(before) == 1
        (tmp_path / file).write_text(text.replace(before, f"{piece}\n\n{before}"))

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "vllm_di.cli", *words]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        return done.stdout + done.stderr

    kernel = ["platform=cpu", "ops=traced"]  # which says "step": compiled into it
    rows = {o: run("explain", *kernel, *o.split()) for o in ("", "ops.layer_norm=torch")}
    line = r"layer_norm +(\w+)"
    assert [re.findall(line, text) for text in rows.values()] == [["step"], ["torch"]]
    assert "did you mean 'layer_norm'" in run("explain", *kernel, "ops.layer_norn=torch")
    judged = run("conform", *kernel, "--only", "ops/test_op[layer_norm-float32]", "--json", "x")
    found = json.loads((tmp_path / "x").read_text())
    assert "pass" in judged and "layer_norm" in str(found)


def test_the_kernel_passes_the_cases_of_its_op() -> None:
    (source,) = blocks("add-a-kernel.md", "python")
    table = SelectedOps(module(source)["MyChipOps"]())
    assert table.describe()["silu_and_mul"] == "MyChipOps"
    assert table.describe()["rms_norm"].startswith("torch")
    for case in cases("silu_and_mul", torch.float32, 0):
        compare(table, "silu_and_mul", case, torch.device("cpu"))
    alone = SelectedOps(TorchOps(), silu_and_mul=module(source)["MyChipOps"]())
    assert alone.describe()["silu_and_mul"] == "MyChipOps"


def test_an_added_method_breaks_nothing_and_an_abstract_one_does(tmp_path: Path) -> None:
    good, bad = blocks("add-an-interface-method.md", "python")

    def breaks(method: str) -> list[Change]:
        base = 'INTERFACE_VERSION = "2.0"\n\n\nclass AttentionBackend(ABC):\n    """One."""\n\n'
        base += "    @abstractmethod\n    def check(self) -> None: ...\n"
        records = []
        for name, text in (("old.py", base), ("new.py", base + "\n" + method)):
            (tmp_path / name).write_text(text)
            records.append(record((tmp_path / name,)))
        found = changes(*records)
        assert [change.name for change in found] == ["AttentionBackend.max_context"]
        return [change for change in found if change.breaks]

    assert breaks(good) == []
    assert len(breaks(bad)) == 1


def test_the_family_is_read_and_its_variant_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = blocks("add-a-model-family.md", "python")
    families = dict(hf_config.FAMILIES)
    module(source, **(vars(hf_config) | {"FAMILIES": families}))
    monkeypatch.setattr(hf_config, "FAMILIES", families)
    used = hf_settings.FAMILY_USED | {"AcmeForCausalLM": frozenset({"use_parallel_residual"})}
    monkeypatch.setattr(hf_settings, "FAMILY_USED", used)
    config = {"architectures": ["AcmeForCausalLM"], "sliding_window": 9, **SHAPE}
    fields = hf_config.model_fields(config)
    assert fields["qk_norm"] is True
    assert fields["layer_types"] == ["sliding_attention"] * SHAPE["num_hidden_layers"]
    with pytest.raises(UnsupportedModelError, match="use_parallel_residual=True"):
        hf_config.model_fields(config | {"use_parallel_residual": True})
    monkeypatch.setattr(hf_settings, "FAMILY_USED", {})
    with pytest.raises(UnsupportedModelError, match="use_parallel_residual"):
        hf_config.model_fields(config | {"use_parallel_residual": True})


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The package acme of this test is not another's."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "acme"]:
        del sys.modules[name]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("executor", ["inline", "multiprocess"])
def test_a_port_adds_a_call_to_its_worker(
    executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, use = blocks("add-a-worker-call.md", "python")
    (option,) = blocks("add-a-worker-call.md", "yaml")
    for file, text in {
        "acme/__init__.py": "",
        "acme/worker.py": worker,
        "acme/conf/worker/acme.yaml": option,
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ranks = 1 if executor == "inline" else 2
    overrides = ["platform=cpu", "model=tiny", "worker=acme", "trust=[acme]"]
    overrides += [f"executor={executor}"]
    overrides += [f"executor.tensor_parallel_size={ranks}"] if ranks > 1 else []
    assembly = assemble(overrides, [tmp_path / "acme/conf"])
    launcher = Launcher(assembly)
    with opened(EngineContainer, assembly, only=["executor"], launcher=launcher) as container:
        running = container.executor()
        running.start()
        powers = module(use, executor=running)["powers"]
        assert [(p.rank, p.watts) for p in powers] == [(rank, 75.0) for rank in range(ranks)]
        with pytest.raises(ConfigError, match=r"no method 'limit_powr'.*did you mean"):
            running.collective("limit_powr", 75)
        with pytest.raises(RequestError, match=r"limit_power\.seconds: Expected `int`, got `str`"):
            running.collective("limit_power", 75, "long")
        with pytest.raises(RequestError, match="a device needs 50 watts, not 10"):
            running.collective("limit_power", 10)
        assert running.collective("limit_power", 80, 5)[0].watts == 80


@pytest.mark.parametrize("page", sorted(p.name for p in HOWTO.glob("*.md")))
def test_commands_and_their_files_are_there(page: str) -> None:
    text = (HOWTO / page).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(
        r"\bmake ([a-z-]+)", "\n".join(re.findall("`[^`]+`|^make .*$", text, re.MULTILINE))
    ):
        assert f"\n{target}:" in makefile, f"{page}: make {target}"
    for path in re.findall(r"(?<![\w/])tests/[\w/.]+", text):
        assert (ROOT / path).exists(), f"{page}: {path}"
