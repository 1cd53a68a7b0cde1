"""Choices for vLLM's slots, without vLLM: which tree an override goes to, its place, each error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_di.containers.compose import ConfigTree
from vllm_di.containers.slots import SLOTS as OWN_SLOTS
from vllm_di.errors import ConfigError
from vllm_di.parts import open_parts
from vllm_di.vllm.assembled import for_parts
from vllm_di.vllm.choices import CONF, Choices, choose
from vllm_di.vllm.container import ADAPTED, CALLED_BY, LAYERS, SHUT, SLOTS, VllmContainer
from vllm_di.vllm.explain import explain, options
from vllm_di.vllm.sources import from_config, from_environment, overrides_of

ENV = "env DI_CONFIG"


def chosen(*texts: str) -> Choices:
    return choose([("platform=cpu", ENV), *((text, ENV) for text in texts)])


def test_nothing_set_leaves_every_slot_to_vllm() -> None:
    assert chosen().chosen == []


def test_an_option_of_ours_takes_the_adapter_and_says_who_chose_it() -> None:
    choices = chosen("attention=sdpa", "ops.rms_norm=torch")
    assert choices.chosen == ["attention", "ops"]
    assert choices.is_ours("attention")
    assert choices.layers == {"RMSNorm": "ours"}
    assert choices.where("attention") == "env DI_CONFIG: attention=sdpa"
    assert choices.where("ops") == "env DI_CONFIG: ops.rms_norm=torch"
    with open_parts(choices.parts, only=["attention", "ops"]) as parts:
        assert type(parts.attention).__name__ == "SdpaAttention"
        library = parts.ops.library_of("rms_norm")
        assert type(library).__name__ == "TorchOps"


def test_a_table_of_ops_takes_every_layer_that_has_an_adapter() -> None:
    assert chosen("ops=torch").layers == dict.fromkeys(LAYERS, "ours")


def test_keys_follow_the_option_that_they_belong_to() -> None:
    choices = chosen("communicator=shared_memory", "communicator.spin=7")
    assert ("communicator.spin=7", ENV) in for_parts(choices)
    assert choices.parts.stages[0]["communicator"]["spin"] == 7


def test_options_of_vllms_own_and_classes_of_a_users() -> None:
    choices = chosen("attention=vllm/flex_attention", "worker._target_=mine.W", "trust=[mine]")
    assert choices.nodes["attention"]["_target_"].endswith("FlexAttentionBackend")
    assert choices.nodes["worker"]["_target_"] == "mine.W"
    assert choices.where("worker") == "env DI_CONFIG: worker._target_=mine.W"
    assert "mine" in choices.packages
    assert choices.chosen == ["worker", "attention"]
    assert not choices.is_ours("attention")


def test_a_layer_by_a_users_class_and_an_order_of_providers() -> None:
    choices = chosen(
        "ops.layers.SiluAndMul=mine.Silu", "ir_op_priority.rms_norm=native", "trust=[mine]"
    )
    assert choices.layers == {"SiluAndMul": "mine.Silu"}
    assert choices.chosen == ["ops", "ir_op_priority"]
    assert choices.where("ir_op_priority") == "env DI_CONFIG: ir_op_priority.rms_norm=native"


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (["attention=sdap"], ["no option 'sdap' in vLLM", "did you mean 'sdpa'?"]),
        (["attention=vllm/flash_atn"], ["did you mean 'vllm/flash_attn'?"]),
        (["attention=ours"], ["no option 'ours'"]),
        (["attenton=sdpa"], ["no slot 'attenton' in vLLM", "did you mean 'attention'?"]),
        (["scheduler=continuous"], ["has no adapter", "scheduler._target_=PACKAGE.CLASS"]),
        (["sampler=standard"], ["has no adapter", "sampler._target_=PACKAGE.CLASS"]),
        (["ops.rms_nrm=torch"], ["ops has no key 'rms_nrm'", "did you mean 'rms_norm'?"]),
        (["ops.rms_norm=tirch"], ["no option 'tirch'", "did you mean 'torch'?"]),
        (["ops.embedding=torch"], ["no part of vLLM calls the op 'embedding'"]),
        (["ops.linear=torch"], ["nothing would call linear", "quantization=none too"]),
        (["ops.paged_attention=torch"], ["nothing would call", "attention=paged too"]),
        (["ops.layers.RMSNrm=a.B"], ["did you mean 'RMSNorm'?"]),
        (["ir_op_priority.rmsnorm=native"], ["did you mean 'rms_norm'?"]),
        (["+attention.block=3"], ["attention.block", "no key but _target_"]),
        (["attention=sdpa", "attention.block=3"], ["attention has no key 'block'"]),
        (["worker"], ["is not an override"]),
        (["~attention"], ["is not an override"]),
        (["platform=cpuu"], ["no option 'cpuu'", "did you mean 'cpu'?"]),
        (["trust=mine"], ["trust", "expected a list"]),
        (["attention._target_=os.system"], ["attention: 'os.system' is refused", "trust="]),
        (["ops.layers.RMSNorm=os.system"], ["ops.layers.RMSNorm: 'os.system' is refused"]),
        (["worker._target_=mine.Worker"], ["worker: 'mine.Worker' is refused"]),
    ],
)
def test_what_is_wrong_is_an_error_with_its_place(texts: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(*texts)
    for part in [ENV, *parts]:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize("slot", SHUT)
def test_a_slot_without_a_hook_says_so_by_name(slot: str) -> None:
    assert slot in OWN_SLOTS
    with pytest.raises(ConfigError, match=f"vLLM offers no hook for {slot}"):
        chosen(f"{slot}=anything")


def test_every_slot_of_ours_is_a_slot_of_vllm_or_has_a_reason() -> None:
    assert {*SLOTS, *SHUT} >= set(OWN_SLOTS)
    assert not set(SLOTS) & set(SHUT)
    assert set(SLOTS) == set(VllmContainer.providers) == set(ConfigTree([CONF]).groups())
    assert {*ADAPTED, *CALLED_BY.values()} <= set(SLOTS)


def test_every_option_composes_and_is_explained() -> None:
    tree = ConfigTree([CONF])
    for slot in SLOTS:
        for option, path in tree.options(slot).items():
            assert tree.read(path).summary, path
            if option != "ours" and slot != "platform":
                assert chosen(f"{slot}={option}").options[slot].option == option
    assert "sdpa" in options("attention")
    assert "vllm/flash_attn" in options("attention")
    assert "ours" not in options("attention")
    with pytest.raises(ConfigError, match="did you mean 'worker'"):
        options("wroker")


def test_explain_says_who_chose_each_slot_and_by_which_hook() -> None:
    rows = {row.slot: row for row in explain(chosen("attention=sdpa", "ops=torch")).rows}
    assert rows["attention"].target.endswith("SdpaAttention")
    assert rows["attention"].chosen_by == ENV
    assert rows["attention"].hook == "Platform.get_attn_backend_cls"
    assert rows["ops.layers.RMSNorm"].place == "env DI_CONFIG: ops=torch"
    assert rows["scheduler"].target == "(vLLM's own choice)"


def test_overrides_come_from_the_environment_and_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Config:
        additional_config = {"vllm_di": ["ops=torch", ["attention=sdpa", "command line"]]}

    monkeypatch.setenv("DI_CONFIG", "attention=paged 'trust=[a, b]'")
    assert from_environment() == [("attention=paged", ENV), ("trust=[a, b]", ENV)]
    where = "--additional-config vllm_di"
    carried = [("ops=torch", where), ("attention=sdpa", "command line")]
    assert from_config(Config()) == carried
    assert overrides_of(Config()) == [*from_environment(), *carried]
    monkeypatch.setenv("DI_CONFIG", "attention='")
    with pytest.raises(ConfigError, match="env DI_CONFIG"):
        from_environment()


@pytest.mark.parametrize("entries", ["attention=sdpa", [3], [["a=b", 1]], [["a", "b", "c"]]])
def test_a_config_of_another_form_is_refused(entries: object) -> None:
    class Config:
        additional_config = {"vllm_di": entries}

    with pytest.raises(ConfigError, match="--additional-config vllm_di: expected"):
        from_config(Config())


def test_with_nothing_chosen_the_plugin_imports_next_to_nothing() -> None:
    code = (
        "import sys\nimport vllm_di.vllm\nvllm_di.vllm.platform()\nimport vllm_di.vllm.hooks\n"
        "heavy = ('torch', 'hydra', 'dependency_injector', 'vllm_di.parts', 'vllm')\n"
        "sys.exit(' '.join(m for m in heavy if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_choosing_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys\nfrom vllm_di.vllm.choices import choose\n"
        "choose([('platform=cpu', 'x'), ('attention=sdpa', 'x')])\n"
        "import vllm_di.vllm.launch\n"
        "sys.exit(' '.join(m for m in ('torch', 'vllm', 'transformers') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
