"""Storage URLs: what they mean, and how they are shown without their password."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from optuna_dlock.errors import InvalidURLError
from optuna_dlock.keys import DEFAULT_PREFIX

URL_VARIABLE = "OPTUNA_DLOCK_URL"
DEFAULT_URL = "embedded:optuna.valkey"

_TCP_SCHEMES = {
    "redis": "redis",
    "valkey": "redis",
    "keydb": "redis",
    "rediss": "rediss",
    "valkeys": "rediss",
    "keydbs": "rediss",
}
_EXAMPLES = "redis://host:6379/0, rediss://…, valkey://…, keydb://…, unix:///path/to.sock, embedded:PATH"
# What may follow "?": our own `prefix`, and these options of the client, passed on as they are.
_CLIENT_OPTIONS = frozenset(
    (
        *("db", "username", "password", "client_name"),
        *("socket_timeout", "socket_connect_timeout", "socket_keepalive"),
        *(
            "ssl_keyfile",
            "ssl_certfile",
            "ssl_cert_reqs",
            "ssl_ca_certs",
            "ssl_ca_path",
            "ssl_check_hostname",
        ),
    )
)


@dataclass(frozen=True)
class Location:
    """Where the data is.

    Attributes:
        redis_url: URL as redis-py takes it, password included; None for an embedded server.
        embedded_path: Folder of the embedded server, absolute; None otherwise.
        prefix: First part of every key name.
        address: What may be shown to people: no user, no password.
    """

    redis_url: str | None
    embedded_path: str | None
    prefix: str
    address: str

    def __repr__(self) -> str:
        return f"Location({self.address!r}, prefix={self.prefix!r})"


def parse_url(url: str | None, prefix: str | None = None) -> Location:
    """Understand a storage URL.

    Args:
        url: One of the forms of the README; None takes `$OPTUNA_DLOCK_URL`, else `embedded:optuna.valkey`.
        prefix: Key space; goes before `?prefix=` of the URL.

    Raises:
        InvalidURLError: If it has an unknown scheme, a bad port or database, or an unknown option.
    """
    if url is None:
        url = os.environ.get(URL_VARIABLE) or DEFAULT_URL
    if not isinstance(url, str):
        raise InvalidURLError(
            f"a storage URL is a string such as {_EXAMPLES}; got {type(url).__name__}", url=None
        )
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in (*_TCP_SCHEMES, "unix", "embedded"):
        raise InvalidURLError(
            f"unknown storage URL {_shown(url)!r}; known forms: {_EXAMPLES}", url=_shown(url)
        )
    if scheme == "embedded":
        return _embedded(rest, prefix)
    parts = urlsplit(url)
    options = _options(parts, url)
    prefix = _checked_prefix(prefix or options.pop("prefix", None), url)
    options.pop("prefix", None)
    redis_scheme = "unix" if scheme == "unix" else _TCP_SCHEMES[scheme]
    address = _unix_address(parts, url) if scheme == "unix" else _tcp_address(parts, url)
    redis_url = urlunsplit((redis_scheme, parts.netloc, parts.path, urlencode(options), ""))
    if redis_scheme == "unix" and not parts.netloc:
        redis_url = "unix://" + parts.path + ("?" + urlencode(options) if options else "")
    return Location(redis_url, None, prefix, address)


def _embedded(rest: str, prefix: str | None) -> Location:
    path, _, query = rest.partition("?")
    parts = SplitResult("embedded", "", path, query, "")
    options = _options(parts, "embedded:" + rest)
    prefix = _checked_prefix(prefix or options.pop("prefix", None), "embedded:" + rest)
    options.pop("prefix", None)
    if not path or options:
        raise InvalidURLError(
            "an embedded URL names a folder and nothing else: embedded:PATH[?prefix=NAME]",
            url="embedded:" + rest,
        )
    path = os.path.abspath(os.path.expanduser(path.removeprefix("//")))
    return Location(None, path, prefix, f"embedded:{path}")


def _options(parts: SplitResult, url: str) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - _CLIENT_OPTIONS - {"prefix"})
    if unknown:
        raise InvalidURLError(
            f"unknown option {unknown[0]!r} in {_shown(url)!r}; known: prefix, "
            + ", ".join(sorted(_CLIENT_OPTIONS)),
            url=_shown(url),
        )
    if not options.get("db", "0").isdecimal():
        raise InvalidURLError(f"the database in {_shown(url)!r} is a number", url=_shown(url))
    return options


def _checked_prefix(prefix: str | None, url: str) -> str:
    if prefix is None:
        return DEFAULT_PREFIX
    if not prefix or any(c in prefix for c in "{} \t\r\n"):
        raise InvalidURLError(
            f"prefix {prefix!r}: a key prefix is not empty and has no braces or white space", url=_shown(url)
        )
    return prefix


def _tcp_address(parts: SplitResult, url: str) -> str:
    host_part = parts.netloc.rpartition("@")[2]
    if "," in host_part:
        raise InvalidURLError(
            f"{_shown(url)!r} names several masters; this version works on one server", url=_shown(url)
        )
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidURLError(f"bad port in {_shown(url)!r}: {error}", url=_shown(url)) from None
    if not host:
        raise InvalidURLError(f"no host in {_shown(url)!r}; known forms: {_EXAMPLES}", url=_shown(url))
    if parts.path not in ("", "/") and not parts.path[1:].isdecimal():
        raise InvalidURLError(
            f"the path of {_shown(url)!r} is a database number, as in redis://host:6379/0", url=_shown(url)
        )
    return f"{host}:{port or 6379}"


def _unix_address(parts: SplitResult, url: str) -> str:
    if not parts.path or parts.path == "/":
        raise InvalidURLError(f"no socket path in {_shown(url)!r}: unix:///path/to.sock", url=_shown(url))
    return parts.path


def _shown(url: str) -> str:
    """The URL without anything that may be a password."""
    head, at, tail = url.rpartition("@")
    if at:
        url = head.partition("://")[0] + "://***@" + tail
    base, question, query = url.partition("?")
    if question and "password" in query:
        url = base + "?***"
    return url
