"""``vllm-di explain --engine vllm``: what each slot of vLLM is to hold, who chose it and where, and
which of vLLM's hooks carries it."""

from __future__ import annotations

import msgspec

from vllm_di.containers.compose import ConfigTree
from vllm_di.containers.tree import ConfigFiles
from vllm_di.errors import ConfigError, nearest
from vllm_di.parts import explain_parts
from vllm_di.vllm import versions
from vllm_di.vllm.assembled import Assembled
from vllm_di.vllm.choices import CONF, OURS, STOCK, Choices
from vllm_di.vllm.container import ADAPTED, LAYERS, SLOTS

OWN = "(vLLM's own choice)"


class Row(msgspec.Struct, frozen=True):
    """One slot, or one layer of the slot ``ops``."""

    slot: str
    target: str
    """Dotted name of the class, or of this project's component behind the adapter."""
    chosen_by: str
    place: str
    hook: str


class Explanation(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    engine: str
    """vLLM's version, and whether the classes were looked at."""
    rows: list[Row]


def explain(choices: Choices) -> Explanation:
    """Check the choices, as far as it goes here, and say what they are. Raises ConfigError."""
    version = versions.installed()
    if version is None:
        engine = (
            "vLLM is not installed here: names and keys were checked, classes of vLLM's were not; "
            f"versions {versions.TESTED[0]} to {versions.TESTED[-1]} are tested"
        )
    else:
        versions.check()
        Assembled(choices).check()
        engine = f"vLLM {version}"
    ours = {row.slot: row.target for row in explain_parts(choices.parts)}
    rows = []
    for slot, fixed in SLOTS.items():
        if slot == "ops":
            rows += [_layer(choices, layer, ours["ops"]) for layer in LAYERS]
            continue
        target = _target(choices, slot, ours)
        origin = choices.options[slot].origin
        own = choices.origins.get(f"{slot}._target_")
        chosen = own if own and own.by_user else origin
        place = choices.where(slot)
        rows.append(Row(slot, target, chosen.chosen_by, place, fixed.hook))
    return Explanation(engine, rows)


def options(slot: str) -> dict[str, str]:
    """Option of a slot to what it is: vLLM's own, then this project's. Raises ConfigError."""
    if slot not in SLOTS:
        raise ConfigError(f"--slot: no slot {slot!r} in vLLM{nearest(slot, SLOTS)}")
    theirs, ours = ConfigTree([CONF]), ConfigFiles.find()
    found = {o: theirs.read(p).summary for o, p in theirs.options(slot).items() if o != OURS}
    if slot in (*ADAPTED, "ops"):
        found |= {o: ours.read(p).summary for o, p in ours.options(slot).items()}
    return found


def _target(choices: Choices, slot: str, ours: dict[str, str]) -> str:
    if choices.is_ours(slot):
        return ours[slot]
    if slot == "ir_op_priority":
        values = {op: v for op, v in choices.nodes[slot].items() if v}
        return ", ".join(f"{op}: {v}" for op, v in values.items()) or OWN
    return choices.nodes[slot]["_target_"] or OWN


def _layer(choices: Choices, layer: str, table: str) -> Row:
    value = choices.layers.get(layer, STOCK)
    target = {STOCK: OWN, OURS: f"{table}: {', '.join(LAYERS[layer])}"}.get(value, value)
    origin = choices.origins.get(f"ops.layers.{layer}") or choices.options["ops"].origin
    return Row(f"ops.layers.{layer}", target, origin.chosen_by, str(origin), SLOTS["ops"].hook)
