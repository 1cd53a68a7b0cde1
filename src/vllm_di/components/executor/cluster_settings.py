"""The keys of ``cluster``: how a cluster is reached, and who may talk to whom."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec

from vllm_di.components import proof
from vllm_di.components.lines import Tls
from vllm_di.errors import ConfigError


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``cluster``."""

    address: str | None
    bind: str
    secret_file: str | None
    tls: Tls | None
    token_file: str | None
    all_interfaces: bool

    def check(self) -> None:
        """Raises ConfigError, with the key."""
        try:
            proof.address_family(self.bind, self.secret_file)
        except ConfigError as error:
            raise ConfigError(f"cluster.{error}", key="cluster.bind") from None
        if self.secret_file is not None:
            try:
                proof.read_secret(Path(self.secret_file))
            except ConfigError as error:
                raise ConfigError(f"cluster.{error}", key="cluster.secret_file") from None
        if self.tls is not None:
            self.tls.context(engine=True)
        if self.address is not None:
            self.host_and_port()
        if self.token_file is not None and not Path(self.token_file).is_file():
            raise ConfigError(
                f"cluster.token_file: there is no file {self.token_file}", key="cluster.token_file"
            )

    def host_and_port(self) -> tuple[str, int]:
        """Of ``address``. Raises ConfigError."""
        host, _, port = (self.address or "").rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(
                f"cluster.address: {self.address!r} is no HOST:PORT, such as 10.0.0.1:6379",
                key="cluster.address",
            )
        return host.strip("[]"), int(port)

    @property
    def is_local(self) -> bool:
        """Whether only this host reaches the engine."""
        return ipaddress.ip_address(self.bind).is_loopback
