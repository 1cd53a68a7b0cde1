"""What a graph policy makes of the step function, looked at before the first step."""

from __future__ import annotations

import inspect

from vllm_di.components.interfaces import GraphPolicy, StepFunction
from vllm_di.errors import ConfigError


def wrapped(graph: GraphPolicy, forward: StepFunction) -> StepFunction:
    """``graph.wrap(forward)``. Raises ConfigError where that is no function of one ModelStep: it
    would fail in the first step."""
    function = graph.wrap(forward)
    try:
        form = inspect.signature(function)
    except ValueError:  # a function of C without a signature
        return function
    except TypeError:
        form = None
    try:
        if form is not None:
            form.bind(None)
            return function
    except TypeError:
        pass
    what = f"a {type(function).__name__}"
    if form is not None:
        plain = [p.replace(annotation=p.empty) for p in form.parameters.values()]
        what = f"a function of {inspect.Signature(plain)}"
    raise ConfigError(
        f"{type(graph).__qualname__}.wrap gives {what}; a step is called with one ModelStep "
        "(docs/interface-versions.md has what changed)",
        key="graph",
    )
