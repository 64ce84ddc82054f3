"""Who may ask: the Host header, the origin of a web page, and the key, checked before a request is read.

A page that rebinds its name to this machine sends its own Host; one that posts across origins sends its
Origin. Keys are compared in constant time.
"""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .defaults import HOST
from .errors import RequestError

LOCAL_NAMES = ("localhost",)
# what needs no key: whether the server lives
OPEN_PATHS = ("/health",)


@dataclass(frozen=True)
class Guard:
    """The rules: `host` is the address that the server is bound to, `key` None asks for none."""

    host: str = HOST
    key: str | None = None
    origins: Sequence[str] = ()
    names: Sequence[str] = ()

    def check(self, path: str, method: str, headers: Headers) -> None:
        """Raise RequestError for a request that may not be served."""
        host = _name_of(f"//{headers.get('host', '')}")
        if not self._is_ours(host):
            raise RequestError(
                403, "the Host header names another server: --allow-host admits it", "bad_host"
            )
        origin = headers.get("origin")
        if origin is not None and not self._may_come_from(origin, headers.get("host", "")):
            raise RequestError(403, "web pages of other origins may not ask: --cors admits one", "bad_origin")
        if self.key is not None and method != "OPTIONS" and path not in OPEN_PATHS:
            self._check_key(headers)

    def _is_ours(self, host: str) -> bool:
        """Tell whether a host name cannot be that of a page: an address, or a name of this machine."""
        if host in (*LOCAL_NAMES, *(_name_of(f"//{name}") for name in self.names), self.host.lower()):
            return True
        if is_loopback(self.host):
            return is_address(host) and is_loopback(host)
        own = socket.gethostname().lower()
        return is_address(host) or host in (own, f"{own}.local", own.partition(".")[0])

    def _may_come_from(self, origin: str, host: str) -> bool:
        return origin in self.origins or "*" in self.origins or urlsplit(origin).netloc == host

    def _check_key(self, headers: Headers) -> None:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(_digest(given), _digest(self.key or "")):
            raise RequestError(401, "the API key is missing or wrong", "invalid_api_key")


class GuardMiddleware:
    """Answers requests that the guard refuses."""

    def __init__(self, app: ASGIApp, guard: Guard, refuse):
        """`refuse` makes a response of a path and a RequestError."""
        self._app, self._guard, self._refuse = app, guard, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._guard.check(scope["path"], scope["method"], Headers(scope=scope))
        except (RequestError, ValueError) as error:
            problem = error if isinstance(error, RequestError) else RequestError(400, "the Host is no name")
            await self._refuse(scope["path"], problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Tell whether an address or name reaches this machine only."""
    return host in LOCAL_NAMES or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    """Tell whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _name_of(url: str) -> str:
    """Return the host in a URL, lower case. Raises ValueError for a malformed one."""
    return (urlsplit(url).hostname or "").lower()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
