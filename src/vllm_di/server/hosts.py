"""Which host names the server accepts.

DNS rebinding: a web page's own name may resolve to this machine, and the page then reads responses
of a server that trusts everyone who reaches it. Its requests still carry the page's name in their
Host header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import unquote

from starlette.types import Scope

from vllm_di.errors import RequestError


class Hosts:
    """Checks the Host header. ``names`` and the loopback interface's names always pass."""

    def __init__(self, names: Sequence[str], *, is_open: bool) -> None:
        self._names = {name.lower() for name in names}
        self._is_open = is_open

    def check(self, host: bytes | None) -> None:
        """Raise RequestError (421) for another name. No header passes: browsers always send one."""
        if self._is_open or host is None:
            return
        name = _name(host)
        if name in self._names or is_loopback(name):
            return
        shown = name[:100]
        raise RequestError(
            f"this server does not accept the host name {shown!r}; use localhost, or start it with "
            f"server.allowed_hosts=[{shown}]",
            code="host_not_allowed",
            status=421,
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address is that of the loopback interface."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # as a socket for both shows it; Python 3.13 looks itself
    return address.is_loopback


def _name(host: bytes) -> str:
    """``Name:port`` or ``[address]:port`` without the port, in lower case."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")


def to_origin_form(scope: Scope) -> None:
    """Rewrite an absolute target, such as ``http://host/path``, to its path, and the Host header to
    its host. Proxies get such targets; HTTP requires servers to accept them."""
    raw: bytes = scope["raw_path"]
    scheme, _, rest = raw.partition(b"://")
    if scheme.lower() not in (b"http", b"https") or not rest:
        return
    authority, slash, path = rest.partition(b"/")
    scope["raw_path"] = b"/" + path if slash else b"/"
    scope["path"] = unquote(scope["raw_path"].decode("ascii"))
    others = [(name, value) for name, value in scope["headers"] if name != b"host"]
    scope["headers"] = [(b"host", authority.rpartition(b"@")[2]), *others]
