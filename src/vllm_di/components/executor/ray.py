"""Workers on the nodes of a Ray cluster.

Ray places their processes and starts them. Each worker then connects to this process, builds its
own container from the assembly and takes the same calls as a worker process of this host does, over
TCP (``components/lines.py``).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_di.components.executor.cluster_settings import ClusterSettings
from vllm_di.components.executor.disaggregated import DisaggregatedExecutor
from vllm_di.components.executor.forwarding import ForwardingExecutor
from vllm_di.components.executor.multiprocess import MultiprocessExecutor
from vllm_di.components.executor.pipeline import PipelineExecutor
from vllm_di.components.executor.ray_host import Placing, RaySite, Strategy
from vllm_di.components.interfaces import KvTransfer, WorkerLauncher
from vllm_di.errors import ConfigError

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=64)]
Amount = Annotated[float, msgspec.Meta(gt=0)]
Limit = Annotated[float, msgspec.Meta(ge=1)]


class RayExecutor(ForwardingExecutor):
    """The ranks of a model in one piece, or the stages of a pipeline, each where Ray has room for
    it. A worker without a heartbeat for ``silence_limit`` seconds ends the engine, with its node's
    name in the error; whoever restarts the engine has its workers placed anew."""

    def __init__(
        self,
        launcher: WorkerLauncher,
        *,
        cluster: ClusterSettings,
        tensor_parallel_size: Count,
        depth: Annotated[int, msgspec.Meta(ge=1)] | None,
        resource: str | None,
        amount: Amount,
        strategy: Strategy,
        place_timeout: Seconds,
        start_timeout: Seconds,
        step_timeout: Seconds,
        silence_limit: Limit,
    ) -> None:
        cluster.check()
        if launcher.num_stages > 1 and tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size: {tensor_parallel_size} ranks of a platform with "
                f"{launcher.num_stages} stages: a stage has one; take 1"
            )
        inner: MultiprocessExecutor | PipelineExecutor
        if launcher.num_stages > 1:
            inner = PipelineExecutor(
                launcher,
                processes=True,
                depth=depth,
                start_timeout=start_timeout,
                step_timeout=step_timeout,
            )
        else:
            inner = MultiprocessExecutor(
                launcher,
                tensor_parallel_size=tensor_parallel_size,
                start_timeout=start_timeout,
                step_timeout=step_timeout,
            )
        placing = Placing(
            resource=resource,
            amount=amount,
            strategy=strategy,
            place_timeout=place_timeout,
            silence_limit=silence_limit,
        )
        inner.run_on(RaySite(cluster, placing).host)
        super().__init__(inner)


class RayDisaggregatedExecutor(ForwardingExecutor):
    """``DisaggregatedExecutor`` with the workers of both roles where Ray has room for them. The end
    of a worker of prompts costs no request; that of the decode side ends the engine."""

    known_roles = DisaggregatedExecutor.known_roles

    def __init__(
        self,
        launcher: WorkerLauncher,
        kv_transfer: KvTransfer,
        *,
        cluster: ClusterSettings,
        prefill_replicas: Count,
        prefill_tensor_parallel_size: Count,
        decode_tensor_parallel_size: Count,
        resource: str | None,
        amount: Amount,
        strategy: Strategy,
        place_timeout: Seconds,
        start_timeout: Seconds,
        step_timeout: Seconds,
        silence_limit: Limit,
    ) -> None:
        cluster.check()
        inner = DisaggregatedExecutor(
            launcher,
            kv_transfer,
            processes=True,
            prefill_replicas=prefill_replicas,
            prefill_tensor_parallel_size=prefill_tensor_parallel_size,
            decode_tensor_parallel_size=decode_tensor_parallel_size,
            start_timeout=start_timeout,
            step_timeout=step_timeout,
        )
        placing = Placing(
            resource=resource,
            amount=amount,
            strategy=strategy,
            place_timeout=place_timeout,
            silence_limit=silence_limit,
        )
        inner.run_on(RaySite(cluster, placing, kv_transfer.check_hosts).host)
        super().__init__(inner)
