"""A head that embeds tokens too: its packed rows replace the table where they hold the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.components.ops.libraries import ISAS, library
from tests.models.checkpoints import make
from tests.models.gguf_files import write
from tests.models.runner import BLOCK, Running, attention, device

from vllm_di.components.communicator.single import SingleCommunicator
from vllm_di.components.interfaces import OpTable, Placement, Quantization
from vllm_di.components.kv_layout.hnd import HndLayout
from vllm_di.components.loader.gguf import GgufLoader
from vllm_di.components.ops.table import SelectedOps
from vllm_di.components.ops.torch import TorchOps
from vllm_di.components.quantization.kept import KeptWeights
from vllm_di.components.quantization.none import NoQuantization
from vllm_di.components.quantization.rounded import RoundedWeights
from vllm_di.models.checkpoint import describe
from vllm_di.models.config import DecoderConfig
from vllm_di.models.decoder import Decoder
from vllm_di.models.hf_config import model_fields

TOKENS = [(5 * i * i + i) % 97 + 1 for i in range(30)]
KINDS: dict[str, Callable[[OpTable], Quantization]] = {
    "none": NoQuantization,
    "int8": partial(RoundedWeights, bits=8, scales="channel"),
    "int4": partial(RoundedWeights, bits=4, scales="group"),
    "gguf": KeptWeights,
}


def running(folder: Path, kind: str, ops: OpTable, case: str = "llama_gqa_tied") -> Any:
    make(case, folder, hidden_size=96, intermediate_size=64)
    file = write(folder, folder / "a.gguf", matrices=gguf.GGMLQuantizationType.Q8_0)
    layout = HndLayout(device(), block_size=BLOCK, dtype="auto")
    backend = attention("sdpa", ops, layout)
    config = DecoderConfig(dtype="float32", **model_fields(describe(str(folder)).hf_config))
    parts = (device(), ops, backend, SingleCommunicator(Placement()), KINDS[kind](ops))
    model = Decoder(*parts, config=config)
    table = weakref.ref(model.head.weight) if model.head is not None else None
    GgufLoader(path=str(file), cache=None, progress=False).load(model)
    gc.collect()
    assert table is not None
    return Running(model, backend, layout), table


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_goes_where_packed_rows_hold_the_same(kind: str, tmp_path: Path) -> None:
    """``ops.embedding=torch`` keeps it. Logits are equal bit by bit."""
    ours, _ = running(tmp_path, kind, SelectedOps(library(ISAS[0])))
    kept, _ = running(tmp_path, kind, SelectedOps(library(ISAS[0]), embedding=TorchOps()))
    table = kept.model.embedding.weight
    assert len(table) == kept.model.vocab_size and kept.model.embedding.packed_embed is None
    saved = table.nbytes if kind in ("none", "gguf") else 0
    assert kept.model.weight_bytes() - ours.model.weight_bytes() == saved
    assert (len(ours.model.embedding.weight) == 0) == (saved > 0)
    assert torch.equal(ours.feed(TOKENS), kept.feed(TOKENS))


def test_a_chosen_product_reads_the_table_once(tmp_path: Path) -> None:
    """torch packs nothing: head and table are one tensor, and counted once."""
    plain, _ = running(tmp_path, "none", SelectedOps(library(ISAS[0]), linear=TorchOps()))
    packed, _ = running(tmp_path, "none", SelectedOps(library(ISAS[0])))
    assert plain.model.weight_bytes() == packed.model.weight_bytes()


def test_the_library_that_embeds_is_the_one_that_was_chosen(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counting(TorchOps):
        def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            seen.append(len(token_ids))
            return super().embedding(token_ids, weight)

    for kind in KINDS:
        chosen = SelectedOps(library(ISAS[0]), embedding=Counting())
        running(tmp_path, kind, chosen)[0].feed(TOKENS)
    assert seen == [len(TOKENS)] * len(KINDS)


@pytest.mark.parametrize("case", ["llama_gqa_tied", "llama2"])
def test_the_memory_of_what_was_packed_is_given_back(case: str, tmp_path: Path) -> None:
    _, table = running(tmp_path, "none", SelectedOps(library(ISAS[0])), case)
    assert table() is None
