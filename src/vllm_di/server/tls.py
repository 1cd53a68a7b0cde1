"""HTTPS: the certificate and its key, checked at the start and read again when the files change."""

from __future__ import annotations

import logging
import os
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from vllm_di.errors import ConfigError

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# ASN.1 tags of a certificate (RFC 5280, 4.1)
_EXPLICIT_VERSION, _UTC_TIME = 0xA0, 0x17

log = logging.getLogger(__name__)


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys ``server.tls.*``."""

    cert: str | None = None
    key: str | None = None
    client_ca: str | None = None
    min_version: str | float = 1.2
    """1.2 or 1.3, as YAML reads it."""
    reload_seconds: Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)] = 10.0
    handshake_seconds: Annotated[float, msgspec.Meta(gt=0.0, le=600.0)] = 10.0

    def check(self) -> None:
        """Raise ConfigError for keys that need ``cert``, and for an unknown version."""
        if str(self.min_version) not in _VERSIONS:
            raise ConfigError(
                f"server.tls.min_version={self.min_version}: expected {' or '.join(_VERSIONS)}"
            )
        for name, value in (("key", self.key), ("client_ca", self.client_ca)):
            if value is not None and self.cert is None:
                raise ConfigError(
                    f"server.tls.{name}={value}: there is no certificate: set server.tls.cert to a "
                    "PEM file with it"
                )


class Tls:
    """The TLS context of new connections. Raises ConfigError for files that cannot serve."""

    def __init__(self, config: TlsConfig) -> None:
        assert config.cert is not None
        self._config = config
        self._cert, self._key = Path(config.cert), Path(config.key or config.cert)
        self._seen = self._signature()
        self._context = self._load()

    @property
    def context(self) -> ssl.SSLContext:
        """For a connection that begins now; those before keep theirs."""
        return self._context

    @property
    def handshake_seconds(self) -> float:
        return self._config.handshake_seconds

    @property
    def reload_seconds(self) -> float:
        """Between two calls of ``refresh``; 0 for none."""
        return self._config.reload_seconds

    def refresh(self) -> None:
        """Read files that have changed. Bad ones are an error line, and what was read before stays
        in use."""
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._context = self._load()
        except (ConfigError, OSError) as error:  # a file may vanish between two looks at it
            log.error("the new certificate is not used, the one before stays: %s", error)
        else:
            log.info("new connections get the certificate that %s holds now", self._cert)

    def _signature(self) -> list[tuple[int, ...] | None]:
        """Differs when a file was written or replaced; the links of a mounted secret are
        followed."""
        files = [self._cert, self._key]
        files += [Path(self._config.client_ca)] if self._config.client_ca else []
        return [_signature(file) for file in files]

    def _load(self) -> ssl.SSLContext:
        config = self._config
        certificate = _read("cert", self._cert)
        _read("key" if config.key else "cert", self._key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[str(config.min_version)]
        context.set_alpn_protocols(["http/1.1"])
        try:
            expires = not_after(certificate)
        except ValueError as error:
            raise ConfigError(f"server.tls.cert={self._cert}: {error}") from None
        try:
            context.load_cert_chain(self._cert, self._key, password=self._no_password)
        except ssl.SSLError as error:
            raise ConfigError(self._refusal(error)) from None
        if config.client_ca is not None:
            _read("client_ca", Path(config.client_ca))
            try:
                context.load_verify_locations(config.client_ca)
            except ssl.SSLError as error:
                raise ConfigError(
                    f"server.tls.client_ca={config.client_ca}: no certificates of an authority in "
                    f"PEM form: {_reason(error)}"
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        self._warn(expires)
        return context

    def _no_password(self) -> str:
        raise ConfigError(
            f"server.tls.key={self._key}: the key is encrypted, and nobody is asked for its "
            "password; write it without: openssl pkey -in KEY -out PLAIN"
        )

    def _refusal(self, error: ssl.SSLError) -> str:
        if error.reason == "KEY_VALUES_MISMATCH":
            return (
                f"server.tls.key={self._key}: this key does not belong to the certificate "
                f"server.tls.cert={self._cert}"
            )
        name = "key" if self._config.key else "cert"
        return (
            f"server.tls.{name}={self._key}: expected a private key in PEM form that belongs to "
            f"server.tls.cert={self._cert}: {_reason(error)}"
        )

    def _warn(self, expires: datetime) -> None:
        if expires < datetime.now(UTC):
            log.warning(
                "server.tls.cert=%s expired on %s: clients will refuse it",
                self._cert,
                f"{expires:%Y-%m-%d}",
            )
        if self._key.stat().st_mode & stat.S_IROTH:
            log.warning(
                "server.tls.key=%s can be read by every user of this machine: chmod 600", self._key
            )


def not_after(pem: str) -> datetime:
    """When the first certificate of a PEM text expires. Raises ValueError for a text without one.

    The ssl module tells this of certificates of peers alone.
    """
    start, end = pem.find(ssl.PEM_HEADER), pem.find(ssl.PEM_FOOTER)
    if not 0 <= start < end:
        raise ValueError("expected a certificate in PEM form")
    der = ssl.PEM_cert_to_DER_cert(pem[start : end + len(ssl.PEM_FOOTER)])
    try:
        (_, certificate), *_ = _elements(der)
        (_, content), *_ = _elements(certificate)
        fields = [f for f in _elements(content) if f[0] != _EXPLICIT_VERSION]
        _, _, _, (_, validity), *_ = fields  # serial number, algorithm, issuer, validity
        _, (tag, value) = _elements(validity)
        text = value.decode("ascii")
        if tag == _UTC_TIME:  # of two digits, those below 50 are of this century
            text = ("20" if text < "5" else "19") + text
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    except (ValueError, IndexError):
        raise ValueError("the certificate is damaged") from None


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(tag, content) of each element of a DER sequence's content."""
    at = 0
    while at < len(data):
        tag, size = data[at], data[at + 1]
        at += 2
        if size & 0x80:
            num_bytes = size & 0x7F
            size = int.from_bytes(data[at : at + num_bytes])
            at += num_bytes
        yield tag, data[at : at + size]
        at += size


def _read(key: str, file: Path) -> str:
    try:
        return file.read_text("latin-1")
    except OSError as error:
        raise ConfigError(
            f"server.tls.{key}={file}: the file cannot be read: {error.strerror}"
        ) from None


def _signature(file: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
