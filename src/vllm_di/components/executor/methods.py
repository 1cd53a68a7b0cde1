"""Which methods of its workers an executor may call."""

from __future__ import annotations

from vllm_di.components.executor.rpc import Call
from vllm_di.components.interfaces import Worker, WorkerLauncher
from vllm_di.components.remote import RemoteMethod, RemoteMethods


class StageMethods:
    """The declared methods of one stage's worker. Those of ``Worker`` are known at once. The
    worker's own class, whose module may need a driver, is imported when another one is called."""

    def __init__(self, launcher: WorkerLauncher, stage: int = 0) -> None:
        self._launcher, self._stage = launcher, stage
        self._methods = RemoteMethods(Worker)
        self._is_whole = False

    def __getitem__(self, name: str) -> RemoteMethod:
        """Raises ConfigError, with the declared methods, for any other name."""
        if name not in self._methods and not self._is_whole:
            self._methods = RemoteMethods(self._launcher.worker_class(self._stage))
            self._is_whole = True
        return self._methods[name]

    def call(self, name: str) -> Call:
        """To a worker process. Raises ConfigError."""
        return Call(self[name])
