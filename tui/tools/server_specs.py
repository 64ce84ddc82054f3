"""Servers of the Model Context Protocol as the settings and a project's `.mcp.json` name them.

Starts nothing. A project's file comes with any folder that one enters, so its servers may only be programs
that the user was shown, and addresses of this machine.
"""

import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ...core.errors import UsageError
from ...core.machine.files import parse_json, read_bytes
from ...core.quoting import quote_value
from ..user.paths import SERVERS_FILE
from .consent import project_key

MAX_FILE_NBYTES = 256 << 10
MAX_SERVERS = 32
NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
# ${NAME} or ${NAME:-default}, as other programs expand them in these files
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
Origin = Literal["settings", "project"]


@dataclass(frozen=True)
class ServerSpec:
    """A server: a program to start, or the address of one that runs."""

    name: str
    origin: Origin
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    disabled: bool = False  # not started before the user switches it on

    @property
    def digest(self) -> str:
        """Distinguish this server from another one of the same name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def target(self) -> str:
        """What is started or asked, in words."""
        return self.url or " ".join(self.command)


@dataclass(frozen=True)
class Project:
    """A project's file: its servers, and the key of the user's answer about this content of it."""

    path: Path
    key: str
    specs: tuple[ServerSpec, ...]


def read_settings(servers: Mapping[str, Any], where: str) -> list[ServerSpec]:
    """Return the servers of the settings. Raises UsageError that begins with `where`."""
    return list(_read(servers, "settings", where))


def read_project(folder: Path) -> Project | None:
    """Return the servers that the project in `folder` names; None if it names none. Raises UsageError."""
    path = folder / SERVERS_FILE
    if not path.is_file():
        return None
    data = read_bytes(path, UsageError, MAX_FILE_NBYTES)
    value = parse_json(data.decode(errors="replace"), str(path), UsageError)
    servers = value.get("mcpServers")
    if servers is None:
        return None
    if not isinstance(servers, dict):
        raise UsageError(f"{path}: mcpServers is {quote_value(servers)}, wanted an object")
    specs = tuple(_read(servers, "project", str(path)))
    return Project(path, project_key(path, data), specs) if specs else None


def _read(servers: Mapping[str, Any], origin: Origin, where: str) -> Iterator[ServerSpec]:
    if len(servers) > MAX_SERVERS:
        raise UsageError(f"{where} names {len(servers)} servers, wanted at most {MAX_SERVERS}")
    for name, fields in sorted(servers.items()):
        if not NAME.fullmatch(name):
            found = f"{where}: a server is called {quote_value(name)}"
            raise UsageError(f"{found}, wanted at most 40 letters, digits, dots, - and _")
        if not isinstance(fields, Mapping):
            raise UsageError(f"{where}: the server {name} is {quote_value(fields)}, wanted a table")
        yield _spec(name, origin, fields, f"{where}: the server {name}")


def _spec(name: str, origin: Origin, fields: Mapping[str, Any], where: str) -> ServerSpec:
    command, url = _text(fields, "command", where), _text(fields, "url", where)
    if bool(command) == bool(url):
        raise UsageError(f"{where} needs either a command or a url")
    if fields.get("type") == "sse":
        raise UsageError(f"{where} speaks the old transport sse, wanted http")
    arguments = fields.get("args") or []
    if not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
        raise UsageError(f"{where}: args is {quote_value(arguments)}, wanted a list of texts")
    if url:
        check_address(_expand(url, where), origin, where)
    return ServerSpec(
        name,
        origin,
        tuple(_expand(word, where) for word in (command, *arguments)) if command else (),
        _texts(fields, "env", where),
        _expand(url, where),
        _texts(fields, "headers", where),
        disabled=fields.get("disabled") is True,
    )


def check_address(url: str, origin: Origin, where: str) -> None:
    """Raise UsageError for an address that may not be asked: only the settings may name other machines."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        raise UsageError(f"{where}: {quote_value(url)} is no address") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"{where}: {quote_value(url)} is no address, wanted http://HOST:PORT/PATH")
    if is_loopback(host):
        return
    if origin == "project":
        raise UsageError(
            f"{where} is on the machine {quote_value(host)}: a project may only name this machine; "
            "name the server in your settings, if you trust it"
        )
    if parts.scheme != "https":
        raise UsageError(f"{where} is on another machine, {quote_value(host)}, so its address must be https")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name) or ""
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f"{where}: {name} is {quote_value(value)}, wanted a text")
    return value


def _texts(fields: Mapping[str, Any], name: str, where: str) -> dict[str, str]:
    value = fields.get(name) or {}
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        raise UsageError(f"{where}: {name} is {quote_value(value)}, wanted a table of texts")
    return {str(key): _expand(text, where) for key, text in value.items()}


def _expand(text: str, where: str) -> str:
    """Replace variables of the environment. Raises UsageError for one that is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise UsageError(f"{where} needs the variable {match[1]}, which is not set")
        return found

    return VARIABLE.sub(value, text)
