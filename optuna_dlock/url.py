"""Storage URLs: what they mean, and how they are shown without their password."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

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
# What may follow "?": our own `prefix` and `password_file`, and these options of the client, passed on as
# they are.
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
        InvalidURLError: If it has an unknown scheme, a bad port or database, or an unknown option, or if
            its password_file cannot be read or is empty.
    """
    if url is None:
        url = _url_from_environment()
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
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may quote the password
        raise InvalidURLError(f"cannot understand the host in {_shown(url)!r}", url=_shown(url)) from None
    if parts.fragment or url.endswith("#"):
        raise InvalidURLError(f"write '#' as %23 in the URL '{scheme}://***'", url=f"{scheme}://***")
    options = _options(parts, url)
    url_prefix = options.pop("prefix", None)
    prefix = _checked_prefix(url_prefix if prefix is None else prefix, url)
    if "password_file" in options:
        if parts.password is not None or "password" in options:
            raise InvalidURLError(
                f"{_shown(url)!r} has both a password and a password_file: give one", url=_shown(url)
            )
        options["password"] = _read_password(options.pop("password_file"), url)
    if scheme == "unix":
        path = _unix_path(parts, url)
        user, at, _ = parts.netloc.rpartition("@")
        base, address = f"unix://{user}{at}{quote(path)}", path
    else:
        address = _tcp_address(parts, url)
        base = urlunsplit((_TCP_SCHEMES[scheme], parts.netloc, parts.path, "", ""))
    redis_url = base + ("?" + urlencode(options) if options else "")
    return Location(redis_url, None, prefix, address)


def _url_from_environment() -> str:
    return os.environ.get(URL_VARIABLE) or DEFAULT_URL


def split_url(url: str | None) -> list[str]:
    """The URL of each master, of a URL that names several: `keydb://m1:6373,m2:6374/0`.

    None takes the same as in `parse_url`. User, password, database and options hold for all. Hosts are
    separated by commas after the "@".

    Raises:
        InvalidURLError: If there are several of these.
    """
    if url is None:
        url = _url_from_environment()
    scheme, colon, rest = url.partition("://")
    if not colon or scheme.lower() not in _TCP_SCHEMES:
        return [url]
    netloc = rest.partition("/")[0].partition("?")[0]
    tail = rest[len(netloc) :]
    user, at, hosts = netloc.rpartition("@")
    if "@" in user:
        shown = f"{scheme}://***@{hosts}"
        raise InvalidURLError(
            f"{shown!r} of several masters names users more than once; write "
            f"{scheme}://user:password@m1:6379,m2:6379, and %40 for an '@' in a password",
            url=shown,
        )
    return [f"{scheme}://{user}{at}{host}{tail}" for host in hosts.split(",")]


def _embedded(rest: str, prefix: str | None) -> Location:
    url = "embedded:" + rest
    path, _, query = rest.partition("?")
    options = _options(SplitResult("embedded", "", path, query, ""), url)
    url_prefix = options.pop("prefix", None)
    prefix = _checked_prefix(url_prefix if prefix is None else prefix, url)
    path = path.removeprefix("//")
    if not path or options:
        raise InvalidURLError(
            "an embedded URL names a folder and nothing else: embedded:PATH[?prefix=NAME]", url=_shown(url)
        )
    path = os.path.abspath(os.path.expanduser(path))
    return Location(None, path, prefix, f"embedded:{path}")


def _options(parts: SplitResult, url: str) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = _known_options(parts.scheme)
    for name, value in options.items():
        if name not in known:
            # A password with "?" or "&" in it looks like an option.
            secret = "@" in parts.query or "pass" in parts.query.lower()
            raise InvalidURLError(
                f"unknown option {'***' if secret else name!r} in {_shown(url)!r}; known here: "
                + ", ".join(sorted(known)),
                url=_shown(url),
            )
        if name == "db" and not value.isdecimal():
            raise InvalidURLError(f"the database in {_shown(url)!r} is a number", url=_shown(url))
        if name.endswith("_timeout") and not _is_duration(value):
            raise InvalidURLError(f"{name} in {_shown(url)!r} is a number of seconds", url=_shown(url))
    return options


def _read_password(path: str, url: str) -> str:
    """The content of a file such as a Docker secret, without the line break that editors leave at its end."""
    try:
        with open(path, encoding="utf-8") as file:
            password = file.read().rstrip("\r\n")
    except OSError as error:
        raise InvalidURLError(
            f"cannot read password_file {path!r}: {error.strerror}", url=_shown(url)
        ) from None
    except UnicodeDecodeError:  # the error would quote the file
        raise InvalidURLError(f"password_file {path!r} is no UTF-8 text", url=_shown(url)) from None
    if not password:
        raise InvalidURLError(f"password_file {path!r} is empty", url=_shown(url))
    return password


def _known_options(scheme: str) -> set[str]:
    """What redis-py's connection class of this scheme takes."""
    known = {"prefix", "password_file", *_CLIENT_OPTIONS}
    if _TCP_SCHEMES.get(scheme) != "rediss":
        known = {name for name in known if not name.startswith("ssl_")}
    if scheme == "unix":
        known.remove("socket_keepalive")
    return known


def _is_duration(value: str) -> bool:
    try:
        return 0 < float(value) < float("inf")
    except ValueError:
        return False


def _checked_prefix(prefix: str | None, url: str) -> str:
    if prefix is None:
        return DEFAULT_PREFIX
    if not prefix or any(c in prefix for c in "{} \t\r\n"):
        raise InvalidURLError(
            f"prefix {prefix!r}: a key prefix is not empty and has no braces or white space", url=_shown(url)
        )
    return prefix


def _tcp_address(parts: SplitResult, url: str) -> str:
    user, _, hosts = parts.netloc.partition("@")  # at the first one: a@one,b@two are two masters
    if "," in (hosts or user):
        raise InvalidURLError(f"{_shown(url)!r} names several masters where one is wanted", url=_shown(url))
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        # Neither the port nor the URL is shown: it may be a password, after which "@host" is missing,
        # or which has a "/" in it.
        shown = f"{parts.scheme}://***"
        raise InvalidURLError(
            f"bad port in {shown!r}: a port is a number up to 65535; special characters in a password are "
            "written as in %2F for '/'",
            url=shown,
        ) from None
    if not host:
        raise InvalidURLError(f"no host in {_shown(url)!r}; known forms: {_EXAMPLES}", url=_shown(url))
    if parts.path not in ("", "/") and not parts.path[1:].isdecimal():
        raise InvalidURLError(
            f"the path of {_shown(url)!r} is a database number, as in redis://host:6379/0", url=_shown(url)
        )
    return f"[{host}]:{port or 6379}" if ":" in host else f"{host}:{port or 6379}"


def _unix_path(parts: SplitResult, url: str) -> str:
    path = unquote(parts.path)
    if parts.netloc.rpartition("@")[2] or path in ("", "/"):
        raise InvalidURLError(f"no socket path in {_shown(url)!r}: unix:///path/to.sock", url=_shown(url))
    return os.path.abspath(path)


def _shown(url: str) -> str:
    """The URL without anything that may be a password."""
    head, at, tail = url.rpartition("@")
    if at:
        scheme, colon, rest = head.partition(":")
        url = f"{scheme}{colon}{'//' if rest.startswith('//') else ''}***@{tail}"
    base, question, query = url.partition("?")
    if question and ("&" in query or not query.startswith("prefix=")):
        url = base + "?***"
    return url
