"""Operators that a vendor's package registers with torch: ``namespace::name`` or
``namespace::name.overload``, each with its schema without the name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.library import Library

from vllm_di.components.interfaces import Device
from vllm_di.errors import ConfigError

_defined: dict[str, Library] = {}
"""torch forgets what a library defined when the library is collected."""


def check_operators(
    device: Device,
    operators: Sequence[str],
    schemas: Mapping[str, str],
    *,
    missing: Mapping[str, str],
    changed: str,
) -> None:
    """Raise ConfigError unless torch has these operators, and each takes the calls that ``schemas``
    describes. ``missing``: namespace to what to install; ``changed``: which version to take."""
    for operator in operators:
        name, _, overload = operator.partition(".")
        declared: list[Any] = torch._C._jit_get_schemas_for_operator(name)
        found = [schema for schema in declared if schema.overload_name == overload]
        namespace = name.partition("::")[0]
        if not found:
            raise ConfigError(
                f"{device.torch_device}: the operator {name} is missing: {missing[namespace]}"
            )
        ours = torch._C.parse_schema(operator + schemas[operator])
        if not found[0].is_backward_compatible_with(ours):
            raise ConfigError(
                f"{device.torch_device}: the operator {name} has changed: it is {found[0]}, and "
                f"this port calls {ours}; take {changed}"
            )


def define_operators(schemas: Mapping[str, str], kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Define stand-ins of these operators, on host tensors: once in a process."""
    for operator, schema in schemas.items():
        if operator in _defined:
            continue
        namespace, _, name = operator.partition("::")
        library = _defined[operator] = Library(namespace, "FRAGMENT")
        library.define(name + schema)
        library.impl(name, kernels[operator], "CPU")


def need(holds: bool, what: str) -> None:
    """What a stand-in refuses, as the vendor's kernel does. Raises RuntimeError."""
    if not holds:
        raise RuntimeError(f"simulated kernel: {what}")
