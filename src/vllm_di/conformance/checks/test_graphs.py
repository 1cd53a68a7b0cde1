"""Captured graphs and padded shapes give what eager steps of any shape give."""

from __future__ import annotations

import pytest
import torch

from vllm_di.components.interfaces import BatchPlan
from vllm_di.conformance.compare import assert_same
from vllm_di.conformance.driving import Answer, Ask, apart, ask, run
from vllm_di.conformance.golden import prompts
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.containers.overrides import read

EAGER = ("graph=eager", "shapes=dynamic")


def plain(subject: Subject) -> bool:
    """Whether steps run eagerly and unpadded."""
    names = [subject.target(slot).rpartition(".")[2] for slot in ("graph", "shapes")]
    return names == ["EagerGraph", "DynamicShapes"]


def check_comparable(subject: Subject) -> None:
    """Raise NotDeclared where there is only one way to run a step."""
    if plain(subject):
        raise NotDeclared("steps are eager and of any shape")
    if subject.declared.static_shapes:
        raise NotDeclared("static_shapes: no other shapes run; the golden checks compare tokens")


def sizes(subject: Subject) -> list[int]:
    """Rows around the sizes that the platform pads to, and all small ones."""
    with subject.parts("shapes") as container:
        shapes = container.shapes()
        most = subject.assembly().engine["scheduler"]["max_num_seqs"]
        padded = {n: len(shapes.pad(decodes(n)).token_ids) for n in range(1, min(most, 40) + 1)}
    grown = {size for n, size in padded.items() if size != n}
    near = {n + d for n in (1, 16, *grown) for d in (-1, 0, 1)}
    return sorted(n for n in {1, 2, 3, 5, 8, *near} if 1 <= n <= 40)


def decodes(count: int) -> BatchPlan:
    """A decode step of so many sequences, for its shape alone."""
    slots = torch.arange(count, dtype=torch.int64)
    lengths = torch.ones(count, dtype=torch.int32)
    return BatchPlan(
        token_ids=torch.zeros_like(slots),
        positions=torch.zeros_like(slots),
        query_start=torch.arange(count + 1, dtype=torch.int32),
        seq_lens=lengths,
        block_table=torch.zeros(count, 1, dtype=torch.int32),
        slot_mapping=slots,
        logits_rows=slots,
        query_lens_host=[1] * count,
        seq_lens_host=[1] * count,
    )


def prompt(length: int, block_size: int) -> BatchPlan:
    """A step of one prompt, in blocks 1, 2, ..."""
    rows = torch.arange(length, dtype=torch.int64)
    blocks = torch.arange(1, -(-length // block_size) + 1, dtype=torch.int32)
    return BatchPlan(
        token_ids=rows + 1,
        positions=rows,
        query_start=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_table=blocks[None],
        slot_mapping=rows + block_size,
        logits_rows=rows[-1:],
        query_lens_host=[length],
        seq_lens_host=[length],
    )


def batches(subject: Subject) -> list[list[Ask]]:
    """One prompt of each size, then decodes of one to eight rows, twice: the second time what was
    captured is replayed."""
    dtype_prompts = prompts(8)
    single = [[ask([(3 * i + n) % 250 for i in range(n)], 3, logprobs=20)] for n in sizes(subject)]
    together = [
        [ask(prompt, 6, logprobs=20) for prompt in dtype_prompts[:n]] for n in (1, 2, 3, 5, 8)
    ]
    return [*single, *together, *together]


def eager(subject: Subject) -> Subject:
    """The same platform without graphs and padding, even where the overrides ask for them."""
    ours = ("graph", "shapes")
    rest = [o for o in subject.overrides if read(o).slot not in ours]
    return Subject([*rest, *EAGER], config_dirs=subject.config_dirs)


def answers(subject: Subject, asked: list[list[Ask]]) -> list[Answer]:
    dtype = f"model.dtype={subject.exact_dtype}"
    with subject.engine(dtype, *subject.prefix_cache_off) as engine:
        return [answer for batch in asked for answer in run(engine, apart(batch))]


def test_replay_equals_eager(subject: Subject, record: Record) -> None:
    check_comparable(subject)
    if subject.declared.graphs:
        record.feature("graphs")
    asked = batches(subject)  # of the sizes that the platform has, for both
    wanted = answers(eager(subject), asked)
    assert_same(answers(subject, asked), wanted, subject.slack, "with graphs")


@pytest.mark.parametrize("model", ["window", "moe"])
def test_other_models(subject: Subject, model: str) -> None:
    check_comparable(subject)
    if model == "window" and not subject.declared.sliding_window:
        raise NotDeclared("sliding_window")
    dtype = f"model.dtype={subject.exact_dtype}"
    asks = [ask(prompt, 24, logprobs=20) for prompt in prompts(5)]
    with eager(subject).engine(dtype, model=model) as engine:
        wanted = run(engine, asks)
    with subject.engine(dtype, model=model) as engine:
        found = run(engine, asks)
    assert_same(found, wanted, subject.slack, "with graphs")


def test_declared_graphs_are_there(subject: Subject) -> None:
    if not subject.declared.graphs:
        raise NotDeclared("graphs")
    if subject.assembly().choices["graph"].origin.chosen_by == "command line":
        raise NotDeclared("the graph policy was chosen on the command line")
    name = subject.target("graph").rpartition(".")[2]
    assert name != "EagerGraph", "graphs are declared, but the graph policy is eager"


def test_nothing_is_compiled_after_the_start(subject: Subject) -> None:
    if not subject.declared.static_shapes:
        raise NotDeclared("static_shapes")
    dtype = f"model.dtype={subject.exact_dtype}"
    with subject.engine(dtype) as engine:
        for batch in batches(subject):
            run(engine, batch)
        assert engine.step().stats.num_compiles == 0


def test_padding_is_written_to_no_block_in_use(subject: Subject) -> None:
    """What a step is padded with has no slot, or one in block 0 where that is kept free; and the
    step's own rows, slots and blocks stay as they are."""
    padded = 0
    with subject.parts("shapes", "limits", "kv_layout") as container:
        shapes, size = container.shapes(), container.kv_layout().block_size
        free = size if container.limits().report().null_block else 0
        for length in (1, 2, 3, 17, 33, 65, 100):
            plan = prompt(length, size)
            found = shapes.pad(plan)
            padded += len(found.token_ids) - length
            for name in ("token_ids", "positions", "slot_mapping"):
                rows = getattr(found, name)[:length]
                assert torch.equal(rows, getattr(plan, name)), f"{name} of {length} tokens changed"
            own = found.block_table[:1, : plan.block_table.shape[1]]
            assert torch.equal(own, plan.block_table), f"the blocks of {length} tokens changed"
            extra = found.slot_mapping[length:]
            wrong = extra[(extra != -1) & ((extra < 0) | (extra >= free))].tolist()
            assert not wrong, f"padding of {length} tokens is written to slots {wrong[:3]}"
    if not padded:
        raise NotDeclared("steps are of any shape")
