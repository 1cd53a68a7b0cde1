"""Certificates of an authority that only the tests trust, by the openssl command."""

from __future__ import annotations

import itertools
import ssl
import subprocess
from pathlib import Path

HOST = "localhost"
_CONFIG = f"""
[req]
distinguished_name = name
x509_extensions = authority
prompt = no
[name]
CN = {HOST}
[authority]
basicConstraints = critical,CA:true
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical,CA:false
subjectAltName = DNS:{HOST},IP:127.0.0.1
authorityKeyIdentifier = keyid
"""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Authority:
    """One authority; its certificates are files of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count(1)
        (folder / "openssl.cnf").write_text(_CONFIG)
        self.file = folder / "authority.pem"
        self._run("req", "-x509", *_NEW_KEY, "-keyout", "authority.key", "-out", "authority.pem")

    def issue(self, name: str = "server", days: int = 30) -> tuple[Path, Path]:
        """Files with a new certificate for localhost, and its key. Existing ones are replaced, the
        certificate first. It expires in ``days``."""
        self._run("req", *_NEW_KEY, "-keyout", "new.key", "-out", "request.pem")
        signed = ("-CA", "authority.pem", "-CAkey", "authority.key", "-extensions", "server")
        number = ("-set_serial", str(next(self._numbers)), "-days", str(days))
        files = ("-in", "request.pem", "-out", "new.pem", "-extfile", "openssl.cnf")
        self._openssl("x509", "-req", *files, *signed, *number)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        (self._folder / "new.key").chmod(0o600)
        (self._folder / "new.pem").replace(cert)
        (self._folder / "new.key").replace(key)
        return cert, key

    def context(self, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """A client's, which trusts this authority alone."""
        context = ssl.create_default_context(cafile=str(self.file))
        if certificate is not None:
            context.load_cert_chain(*certificate)
        return context

    def encrypt(self, key: Path) -> None:
        """Put a password on a key's file."""
        wanted = ("-aes256", "-passout", "pass:secret")
        self._openssl("pkey", "-in", str(key), *wanted, "-out", str(key) + ".locked")
        Path(str(key) + ".locked").replace(key)

    def _run(self, command: str, *words: str) -> None:
        self._openssl(command, *words, "-config", "openssl.cnf")

    def _openssl(self, *words: str) -> None:
        done = subprocess.run(
            ["openssl", *words], cwd=self._folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
