"""Parts of a worker, built for another engine: no checkpoint, no model, no engine."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.interfaces import AttentionSpec, BatchPlan
from vllm_di.components.messages import KvSpec
from vllm_di.components.ops.torch import TorchOps
from vllm_di.containers.assembly import Assembly
from vllm_di.errors import ConfigError, PortError
from vllm_di.parts import PARTS, Parts, assemble_parts, explain_parts, open_parts

ENV = "env DI_CONFIG"
SPECS = [KvSpec(layer=0, num_kv_heads=2, head_size=64)]
TOKENS = 5


def attend(parts: Parts) -> torch.Tensor:
    """A prompt through the cache of the parts."""
    torch.manual_seed(0)
    q = torch.randn(TOKENS, 4, 64, dtype=parts.dtype)
    k, v = (torch.randn(TOKENS, 2, 64, dtype=parts.dtype) for _ in range(2))
    (cache,) = parts.allocate(2)
    positions = torch.arange(TOKENS)
    plan = BatchPlan(
        token_ids=positions,
        positions=positions,
        query_start=torch.tensor([0, TOKENS], dtype=torch.int32),
        seq_lens=torch.tensor([TOKENS], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=positions,
        logits_rows=positions[-1:],
        query_lens_host=[TOKENS],
        seq_lens_host=[TOKENS],
    )
    spec = AttentionSpec(4, 2, 64, 64**-0.5)
    return parts.attention.forward(q, k, v, cache, parts.attention.build(plan), spec)


def test_two_at_once_with_different_choices_and_equal_results() -> None:
    ours = assemble_parts([("ops.rms_norm=torch", ENV)], platform="cpu")
    theirs = assemble_parts(["attention=sdpa"], platform="cpu")
    theirs = Assembly.decode(theirs.encode())  # as in another process
    with (
        open_parts(ours, dtype="float32", specs=SPECS) as one,
        open_parts(theirs, dtype=torch.float32, specs=SPECS, only=["attention"]) as two,
    ):
        assert isinstance(one.ops.library_of("rms_norm"), TorchOps)
        assert not isinstance(one.attention, SdpaAttention)
        assert isinstance(two.attention, SdpaAttention)
        torch.testing.assert_close(attend(one), attend(two), rtol=1e-5, atol=1e-5)
        run = one.quantization.linear(torch.eye(64), None)
        assert torch.equal(run(torch.ones(1, 64)), torch.ones(1, 64))
        assert one.communicator.world_size == 1
        with pytest.raises(ConfigError, match="sampler was not asked for"):
            two.sampler  # noqa: B018 - the look is the test


def test_closing_frees() -> None:
    threads = torch.get_num_threads()
    chosen = assemble_parts(["attention=sdpa", "ops=torch"], platform="cpu")
    with open_parts(chosen, specs=SPECS) as parts:
        held = [weakref.ref(getattr(parts, name)) for name in ("ops", "attention", "device")]
        del parts
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attention=sdap", r"env DI_CONFIG: 'attention=sdap': group 'attention' has no .*'sdpa'\?"),
        ("atention=sdpa", r"env DI_CONFIG: 'atention=sdpa': no such group or key .*'attention'\?"),
        ("attention.blok=3", r"env DI_CONFIG: 'attention.blok=3': attention has no key 'blok'"),
        ("ops.rms_norm=tirch", r"env DI_CONFIG: ops.rms_norm=tirch: .*did you mean 'torch'\?"),
        ("scheduler=continuous", r"env DI_CONFIG: 'scheduler=continuous': scheduler is not one of"),
        ("loader=dummy", r"env DI_CONFIG: 'loader=dummy': loader is not one of the parts"),
        ("attention", r"env DI_CONFIG: 'attention' is not an override"),
        ("device=host device.threads=2", r"env DI_CONFIG: .*has no option"),
    ],
)
def test_an_error_names_the_callers_origin(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assemble_parts([("ops=torch", "--additional-config"), (override, ENV)], platform="cpu")


def test_values_and_pairs_are_checked_with_their_origin() -> None:
    wrong = assemble_parts([("device.threads=many", ENV)], platform="cpu")
    for check in (explain_parts, lambda assembly: open_parts(assembly).__enter__()):
        with pytest.raises(ConfigError, match=r"env DI_CONFIG: device.threads=many: device.thr"):
            check(wrong)
    unread = assemble_parts([("kv_layout=nhd", ENV), "attention=paged"], platform="cpu")
    with pytest.raises(ConfigError, match="layouts hnd, not 'nhd'"):
        open_parts(unread).__enter__()
    with pytest.raises(ConfigError, match=r"only: no part 'attn'.*did you mean 'attention'\?"):
        open_parts(unread, only=["attn"]).__enter__()


def test_explain_names_the_origin() -> None:
    chosen = assemble_parts([("attention=sdpa", ENV)], platform="cpu")
    rows = {row.slot: row for row in explain_parts(chosen)}
    assert sorted(rows) == sorted(PARTS)
    assert (rows["attention"].chosen_by, rows["attention"].place) == (ENV, f"{ENV}: attention=sdpa")
    assert rows["attention"].target.endswith("SdpaAttention")
    assert rows["ops"].chosen_by == "platform"


def test_a_platform_with_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"env X: platform=hybrid_cpu_openvino: it has stages"):
        assemble_parts([("platform=hybrid_cpu_openvino", "env X")])


def test_a_class_outside_the_packages_is_refused() -> None:
    chosen = assemble_parts([("attention._target_=nowhere.Attention", ENV)], platform="cpu")
    with pytest.raises(ConfigError, match=r"env DI_CONFIG: .*'nowhere.Attention' is refused"):
        explain_parts(chosen)


def test_choosing_imports_no_torch() -> None:
    code = (
        "import sys; from vllm_di.parts import assemble_parts\n"
        "assemble_parts(['attention=sdpa'], platform='cpu')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_missing_driver_is_a_port_error() -> None:
    with pytest.raises(PortError), open_parts(assemble_parts(platform="ascend")):
        pass


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
    section = page.partition("## Parts for another engine")[2]
    exec(section.partition("```python\n")[2].partition("```")[0], {})
    assert capsys.readouterr().out.startswith("SdpaAttention ")
