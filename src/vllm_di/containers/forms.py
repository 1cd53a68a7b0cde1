"""Whether the methods of a class take the calls that its interface declares: a class in the form of
older interfaces is an error at the start, and no TypeError in the middle of a step.

Only methods that other packages write are looked at; those of this project are held by its types.
"""

from __future__ import annotations

import inspect
from typing import Any

from vllm_di.components import interfaces, messages


def misfit(cls: type, kind: type) -> str | None:
    """The first method of ``cls`` that has another form than its interface ``kind`` declares, with
    both forms; None where all fit."""
    for name, declared in vars(kind).items():
        owner = next(c for c in cls.__mro__ if name in vars(c))
        if name.startswith("_") or owner.__module__.split(".")[0] == "vllm_di":
            continue
        written = vars(owner)[name]
        is_property = isinstance(declared, property)
        if is_property and inspect.isfunction(written):
            return f"{cls.__qualname__}.{name} is a method; {kind.__name__}.{name} is a property"
        if not inspect.isfunction(declared):
            continue
        if isinstance(written, property) or not callable(getattr(cls, name)):
            return f"{cls.__qualname__}.{name} is no method; {kind.__name__}.{name} is one"
        form = _form(written)
        if form is not None and not _takes(form, _form(declared)):
            return (
                f"{cls.__qualname__}.{name} takes {_shown(form)}, but it is called as "
                f"{kind.__name__}.{name}{_shown(_form(declared))}"
            )
    return None


def _form(function: Any) -> inspect.Signature | None:
    """The signature as a caller sees it: without ``self``. None where there is none to read."""
    try:
        form = inspect.signature(getattr(function, "__func__", function))
    except (TypeError, ValueError):
        return None
    parameters = list(form.parameters.values())
    bound = [] if isinstance(function, staticmethod) else parameters[:1]
    if bound and bound[0].kind is bound[0].VAR_POSITIONAL:
        bound = []
    return form.replace(parameters=parameters[len(bound) :])


def _takes(form: inspect.Signature, declared: inspect.Signature | None) -> bool:
    """Whether each call that ``declared`` allows suits ``form``."""
    assert declared is not None
    places = [p for p in declared.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p for p in declared.parameters.values() if p.kind is p.KEYWORD_ONLY]
    more = [None for p in declared.parameters.values() if p.kind is p.VAR_POSITIONAL]
    fewest = [None for p in places if p.default is p.empty]
    needed = {p.name: None for p in names if p.default is p.empty}
    every = {p.name: None for p in names}
    try:
        form.bind(*fewest, **needed)
        form.bind(*(None for _ in places), *more, **every)
    except TypeError:
        return False
    own = [p for p in form.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(own) > len(places) and not more and places and own[0].name != places[0].name:
        return False  # execute(plan, hidden=None) for execute(step): not the same thing with more
    return all(map(_takes_type, own, places))


def _takes_type(own: inspect.Parameter, declared: inspect.Parameter) -> bool:
    """False where both name a type of the interfaces, and not the same one."""
    mine, theirs = _type_of(own.annotation), _type_of(declared.annotation)
    return mine is None or theirs is None or issubclass(theirs, mine)


def _type_of(annotation: Any) -> type | None:
    """The class of the interfaces or the messages that an annotation names, if any. It is read as
    text: what stands under ``TYPE_CHECKING`` cannot be evaluated."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    name = name.rpartition(".")[2]
    found = vars(interfaces).get(name) or vars(messages).get(name)
    return found if isinstance(found, type) else None


def _shown(form: inspect.Signature | None) -> str:
    """Names and defaults alone."""
    assert form is not None
    plain = [p.replace(annotation=p.empty) for p in form.parameters.values()]
    return str(inspect.Signature(plain))
