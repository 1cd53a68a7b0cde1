"""A world of one rank."""

from __future__ import annotations

from torch import Tensor

from vllm_di.components.interfaces import Communicator, Placement
from vllm_di.errors import ConfigError


class SingleCommunicator(Communicator):
    """Every collective gives back what it got."""

    def __init__(self, placement: Placement) -> None:
        if placement.world_size != 1:
            raise ConfigError(
                f"communicator=single cannot join {placement.world_size} ranks; "
                "take communicator=shared_memory or torch_distributed"
            )
        self.rank, self.world_size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x
