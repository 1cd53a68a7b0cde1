"""The options of conf/model: each is a whole architecture, of exactly the published size."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from omegaconf import OmegaConf

from vllm_di.components.attention.sdpa import SdpaAttention
from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.device.host import HostDevice
from vllm_di.components.interfaces import Placement
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.containers.compose import ConfigTree
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.models.hf_config import FAMILIES

PARAMETERS = {
    "gemma2": 2_614_341_888,
    "gemma3": 999_885_952,
    "granite": 2_533_531_648,
    "llama3": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral": 7_248_023_552,
    "mixtral": 46_702_792_704,
    "phi3": 3_821_079_552,
    "qwen2": 494_032_768,
    "qwen3": 596_049_920,
    "smollm3": 3_075_098_624,
}
"""As the model cards count them."""
FROM_CHECKPOINT = {"local", "smollm2"}


class Nowhere(HostDevice):
    """Shapes without memory."""

    torch_device = torch.device("meta")


def composed(option: str) -> dict[str, Any]:
    values = ConfigTree.find(()).compose([f"model={option}"]).values
    node: Any = OmegaConf.to_container(values.model)
    assert node.pop("_target_") == "vllm_di.models.decoder.Decoder"
    assert node.pop("architectures") is None, "ours are found by the decoder's own list"
    return dict(node)


@pytest.mark.parametrize("option", PARAMETERS)
def test_parameters_are_those_of_the_published_model(option: str) -> None:
    config = msgspec.convert(composed(option), DecoderConfig)
    assert config.architecture in FAMILIES
    device = Nowhere(threads=None, memory_budget=None, default_dtype="bfloat16")
    layout = HndLayout(device, block_size=16, dtype="auto")
    model = Decoder(
        device,
        TorchOps(),
        SdpaAttention(layout),
        SingleCommunicator(Placement()),
        NoQuantization(TorchOps()),
        config=msgspec.structs.replace(config, max_model_len=64),
    )
    total = sum(math.prod(target.shape) for target in model.targets().values())
    assert total == PARAMETERS[option]
    device.close()


def test_every_option_is_tested_here() -> None:
    options = set(ConfigTree.find(()).options("model"))
    assert options == set(PARAMETERS) | FROM_CHECKPOINT | {"tiny"}


def test_every_key_of_a_model_stands_in_the_base() -> None:
    fields = {*DecoderConfig.__struct_fields__}
    assert set(composed("local")) == fields


def test_tiny_brings_its_random_weights() -> None:
    assert ConfigTree.find(()).compose(["model=tiny"]).choices["loader"][0] == "dummy"
    assert composed("tiny")["num_hidden_layers"] == 2
