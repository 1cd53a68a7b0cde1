"""``vllm-di explain``: which class fills each slot, who chose it, and where."""

from __future__ import annotations

import sys

import msgspec

from vllm_di.commands.arguments import Arguments, UsageError, engine, no_words
from vllm_di.commands.say import say, warn
from vllm_di.commands.table import print_table, short_name


def run(arguments: Arguments) -> int:
    """A table, data (``--json``), the alternatives of one slot (``--slot NAME``), or a picture
    (``--graph FILE.svg``)."""
    no_words(arguments)
    graph = arguments.options.get("--graph")
    if graph is not None:
        _check_graph(graph, arguments)
    if engine(arguments):
        from vllm_di.commands.vllm import explain_slots

        return explain_slots(arguments)
    from vllm_di.containers.assembly import assemble
    from vllm_di.containers.explain import alternatives, explain

    slot = arguments.options.get("--slot")
    if slot is not None:
        found = alternatives(slot, arguments.config_dirs)
        print_table(["option", "what it is"], [list(row) for row in found.items()])
        return 0
    assembly = assemble(arguments.overrides, arguments.config_dirs, incomplete=True)
    warn(assembly.warnings)
    told = explain(
        assembly,
        config_dirs=arguments.config_dirs,
        ops="--no-ops" not in arguments.switches,
    )
    if graph is not None:
        from vllm_di.commands.graph import picture, write
        from vllm_di.containers.overview import overview_of

        write(graph, picture(overview_of(assembly, told.rows)))
        say(f"{graph}: {len(told.rows)} slots; {told.announcement}")
        if "--json" not in arguments.switches:
            return 0
    if "--json" in arguments.switches:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(told)).decode() + "\n")
        return 0
    print(f"{told.announcement}; {told.platform_reason}; interfaces {told.interface}\n")
    print_table(
        ["slot", "class", "chosen by", "place"],
        [[r.slot, short_name(r.target), r.chosen_by, r.missing or r.place] for r in told.rows],
    )
    if told.replicas > 1:
        router = next(r for r in told.rows if r.slot == "router")
        print(
            f"\n{told.replicas} replicas of engine and workers behind one API process "
            f"({told.replicas_place}); router={router.option} shares requests out"
        )
    if told.nodes:
        print("\n" + "\n".join(told.nodes))
    if told.ops:
        print()
        print_table(["op", "runs on"], [[row.op, row.runs_on] for row in told.ops])
        print(f"\nfusions in force: {', '.join(told.fusions) or 'none'}")
    values = ", ".join(f"{name} {value:g}" for name, value in told.sampling.items())
    print(f"\nsampling defaults: {values or 'none'} ({told.sampling_place})")
    return 0


def _check_graph(name: str, arguments: Arguments) -> None:
    for other in ("--slot", "--engine"):
        if other in arguments.options:
            raise UsageError(f"--graph draws a whole assembly of ours, not {other}: leave one out")
    if not name.endswith(".svg"):
        raise UsageError(f"--graph {name}: the picture is SVG; choose a name that ends in .svg")
