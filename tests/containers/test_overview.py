"""The assembly as a picture and as data: it says what ``explain`` says, of every container."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest

from vllm_di.cli import main
from vllm_di.commands.graph import picture
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.overview import overview, overview_of
from vllm_di.server.overview import Overview

SVG = "{http://www.w3.org/2000/svg}"
ASSEMBLIES = [
    ["platform=cpu", "model=tiny", "attention=sdpa"],
    ["platform=split_cpu_cpu", "model=tiny", "decode.attention=sdpa"],
    [
        "platform=hybrid_cpu_openvino",
        "model=tiny",
        "stages.0.model.layers=[0,1]",
        "stages.1.model.layers=[1,2]",
    ],
    ["platform=cpu", "model=tiny", "executor.data_parallel_size=3"],
]
NAMES = [" ".join(chosen) for chosen in ASSEMBLIES]


@pytest.mark.parametrize("chosen", ASSEMBLIES, ids=NAMES)
def test_it_says_what_explain_says(chosen: list[str]) -> None:
    assembly = assemble(chosen)
    told = explain(assembly, ops=False)
    found = overview(assembly)
    assert found == overview_of(assembly, told.rows)
    assert (found.replicas, found.announcement) == (told.replicas, told.announcement)
    shown = [(c.name, s.key, s.target, s.chosen_by) for c in found.containers for s in c.slots]
    assert shown == [(r.container, r.slot, r.target, r.chosen_by) for r in told.rows]
    parts = [(c.name, c.part) for c in found.containers]
    assert len(parts) == len({*parts})


def test_the_api_process_stays_free_of_torch() -> None:
    code = (
        "import sys\n"
        "from vllm_di.containers.assembly import assemble\n"
        "from vllm_di.containers.overview import overview\n"
        "assert len(overview(assemble(['platform=cpu', 'model=tiny'])).containers) == 3\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_an_override_holds_beyond_a_word_is_not_told() -> None:
    assembly = assemble(["platform=cpu", "model=tiny"])
    rows = explain(assembly, ops=False).rows
    for place, shown in [
        ("command line: attention=sdpa", "command line: attention=sdpa"),
        ("command line: +tokenizer={_target_:a.B,token:abc}", "command line: +tokenizer=…"),
        ("env DI_CONFIG: tokenizer=[abc]", "env DI_CONFIG: tokenizer=…"),
        ("conf/ops/cpu.yaml:4", "conf/ops/cpu.yaml:4"),
    ]:
        changed = msgspec.structs.replace(rows[0], place=place, chosen_by=place.split(":")[0])
        assert overview_of(assembly, [changed]).containers[0].slots[0].place == shown


def texts(root: ElementTree.Element) -> str:
    return "\n".join(root.itertext())


@pytest.mark.parametrize("chosen", ASSEMBLIES, ids=NAMES)
def test_the_picture_has_every_slot(
    chosen: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "assembly.svg"
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--no-ops", "--graph", str(file), *chosen])
    assert ended.value.code == 0
    out, said = capsys.readouterr()
    assert (out, str(file) in said) == ("", True)
    root = ElementTree.fromstring(file.read_text("utf-8"))
    told = explain(assemble(chosen), ops=False)
    drawn = {node.get("data-slot"): node for node in root.iter(f"{SVG}g") if node.get("data-slot")}
    assert {*drawn} == {row.slot for row in told.rows}
    for row in told.rows:
        said = texts(drawn[row.slot])
        assert row.target in said
        assert row.chosen_by in said
        assert row.place in said
        assert all(option in said for option in row.alternatives)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    boxes = []
    for group in root.iter(f"{SVG}g"):
        if group.get("data-container"):
            x, y = map(float, group.get("transform", "")[10:-1].split())
            box = group.find(f"{SVG}rect")
            assert box is not None
            boxes.append((x, y, x + float(box.get("width", 0)), y + float(box.get("height", 0))))
    for one in boxes:
        assert one[0] >= 0 and one[1] >= 0 and one[2] <= width and one[3] <= height
        for other in boxes:
            apart = one[2] <= other[0] or other[2] <= one[0]
            apart = apart or one[3] <= other[1] or other[3] <= one[1]
            assert one is other or apart, "no box covers another"


def test_any_text_makes_a_good_picture() -> None:
    found = overview(assemble(["platform=cpu", "model=tiny"]))
    slot = found.containers[0].slots[0]
    slot.target = slot.place = slot.missing = slot.chosen_by = "<b>&\"']]>\x00\x1b" + "x" * 200
    root = ElementTree.fromstring(picture(msgspec.structs.replace(found, model="</svg>&\ud800")))
    assert "<b>&\"']]>" in texts(root)
    assert isinstance(found, Overview)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--graph", "{}/none/a.svg"], "cannot be written: No such file"),
        (["--graph", "{}"], "ends in .svg"),
        (["--graph", "{}/a.png"], "ends in .svg"),
        (["--graph", "--json"], "needs a value"),
        (["--graph", "{}/a.svg", "--slot", "ops"], "not --slot"),
        (["--graph", "{}/a.svg", "--engine", "vllm"], "not --engine"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--no-ops", *(w.format(tmp_path) for w in words), "model=tiny"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
