"""``executor.data_parallel_size``: how many engines answer behind one API process.

Whoever starts the engines counts them, so that every executor has the key and none needs to know
it: an engine is one of several, and its executor sees to the workers of that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from vllm_di.containers.origins import Origin, place_of
from vllm_di.errors import ConfigError

KEY = "data_parallel_size"
PATH = f"executor.{KEY}"
MOST = 1_024
Count = Annotated[int, msgspec.Meta(ge=1, le=MOST)]


def take_num_replicas(executor: dict[str, Any], origins: Mapping[str, Origin]) -> int:
    """Take the key out of the executor's node. 1 where it has none. Raises ConfigError."""
    value = executor.pop(KEY, 1)
    try:
        return msgspec.convert(value, Count)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{place_of(origins, PATH)}: {PATH}: {error}: from 1 to {MOST} engines (the value is "
            f"{value!r})"
        ) from None


def refuse_alone(num_replicas: int, replica: int | None, place: str) -> None:
    """Raise ConfigError where several engines are wanted, and one is opened in this process."""
    if num_replicas > 1 and replica is None:
        raise ConfigError(
            f"{place}: {PATH}={num_replicas}: replicas are engine processes behind the API "
            "process of `vllm-di serve`; here one engine runs: set it to 1"
        )
