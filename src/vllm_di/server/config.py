"""The settings of the HTTP server: the keys of ``conf/server/openai.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from vllm_di.errors import ConfigError
from vllm_di.server.hosts import is_loopback
from vllm_di.server.tls import TlsConfig

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)]
Interval = Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The YAML file documents the keys. The defaults are the same, for use from Python."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 8000
    unix_socket: str | None = None
    tls: TlsConfig = TlsConfig()
    model_name: str | None = None
    served_model_name: str | None = None
    platform: str | None = None
    level: str | None = None
    claimed_level: str | None = None
    sampling: dict[str, int | float] = {}
    api_key_file: str | None = None
    api_key_env: str | None = None
    insecure: bool = False
    allowed_hosts: list[str] = []
    cors_origins: list[str] = []
    page: bool = True
    max_queue: Count = 1024
    max_inputs: Count = 2048
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=2**30)] = 8 * 2**20
    max_json_depth: Annotated[int, msgspec.Meta(ge=4, le=500)] = 64
    unknown_fields: Literal["count", "refuse"] = "count"
    body_timeout_seconds: Interval = 60.0
    request_timeout_seconds: Interval | None = None
    keep_alive_seconds: Interval = 15.0
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    header_timeout_seconds: Interval = 20.0
    write_timeout_seconds: Interval = 30.0
    max_unsent_bytes: Annotated[int, msgspec.Meta(ge=128 * 2**10, le=2**30)] = 256 * 2**10
    idle_connection_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 30
    drain_seconds: Seconds = 30.0
    engine_restarts: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 1
    response_store_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**34)] = 16 * 2**20
    tokenizer_info: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    access_log: bool = False

    @property
    def name(self) -> str:
        """The name that clients use for the model."""
        return self.served_model_name or self.model_name or "model"

    @property
    def scheme(self) -> Literal["http", "https"]:
        """Of the URLs of a TCP port."""
        return "http" if self.tls.cert is None else "https"

    def checks_hosts(self, *, has_keys: bool) -> bool:
        """Whether to check the Host header: where ``allowed_hosts`` is set, and on loopback without
        API keys, where any web page could reach the server."""
        if self.unix_socket:
            return False
        return bool(self.allowed_hosts) or (is_loopback(self.host) and not has_keys)

    def check_exposure(self, *, has_keys: bool) -> None:
        """Raise ConfigError when other machines can reach the server and it needs no API key."""
        if self.unix_socket or has_keys or self.insecure or is_loopback(self.host):
            return
        raise ConfigError(
            f"server.host={self.host} can be reached from other machines, and there is no API key: "
            "set server.api_key_file or server.api_key_env, or server.insecure=true if that is "
            "intended"
        )
