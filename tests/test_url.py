"""Storage URLs: each form, each mistake, and no password in anything that is shown."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import redis

from optuna_dlock.errors import DLockError, InvalidURLError
from optuna_dlock.server import server_of_url
from optuna_dlock.url import DEFAULT_URL, URL_VARIABLE, parse_url, split_url

SECRET = "s3cret"  # noqa: S105 -- what must not be shown


@pytest.mark.parametrize(
    ("url", "redis_url"),
    [
        ("redis://host:7000/2", "redis://host:7000/2"),
        ("valkey://host:7000/2", "redis://host:7000/2"),
        ("keydb://host:7000/2", "redis://host:7000/2"),
        ("rediss://host:7000/2", "rediss://host:7000/2"),
        ("valkeys://host:7000/2", "rediss://host:7000/2"),
        ("keydbs://host:7000/2", "rediss://host:7000/2"),
        ("REDIS://host:7000/2", "redis://host:7000/2"),
    ],
)
def test_each_scheme_of_one_server_becomes_the_clients_own(url: str, redis_url: str) -> None:
    location = parse_url(url)
    assert location.redis_url == redis_url
    assert location.address == "host:7000"
    assert location.embedded_path is None


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host", "host:6379"),
        ("redis://host/", "host:6379"),
        ("redis://user:pw@host/1", "host:6379"),
        ("redis://[::1]:7000/0", "[::1]:7000"),
        ("redis://[::1]", "[::1]:6379"),
        ("unix:///run/valkey.sock", "/run/valkey.sock"),
        ("unix:/run/valkey.sock", "/run/valkey.sock"),
        ("unix://user:pw@/run/valkey.sock?db=2", "/run/valkey.sock"),
        ("unix:///run/a%20b%23c.sock", "/run/a b#c.sock"),
        ("unix:///run/a b.sock", "/run/a b.sock"),
    ],
)
def test_the_address_is_where_the_server_is_and_no_more(url: str, address: str) -> None:
    assert parse_url(url).address == address


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"redis://:{SECRET}@host:7000/2", {"host": "host", "port": 7000, "db": 2, "password": SECRET}),
        (f"redis://bob:{SECRET}@host", {"host": "host", "username": "bob", "password": SECRET}),
        ("redis://:a%2Fb%40c@host", {"host": "host", "password": "a/b@c"}),
        (
            f"redis://host?username=bob&password={SECRET}&db=3",
            {"username": "bob", "password": SECRET, "db": 3},
        ),
        ("redis://host?password=a%26b", {"password": "a&b"}),
        (
            "redis://host?socket_timeout=2.5&socket_connect_timeout=1&socket_keepalive=yes&client_name=me",
            {
                "socket_timeout": 2.5,
                "socket_connect_timeout": 1.0,
                "socket_keepalive": True,
                "client_name": "me",
            },
        ),
        ("redis://host/1?prefix=a", {"host": "host", "db": 1}),
        ("unix:///run/a%20b.sock", {"path": "/run/a b.sock"}),
        ("unix:///run/a%2520b.sock", {"path": "/run/a%20b.sock"}),
        (f"unix://:{SECRET}@/run/v.sock?db=4", {"path": "/run/v.sock", "db": 4, "password": SECRET}),
        (
            "rediss://host?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem&ssl_cert_reqs=required",
            {"host": "host", "ssl_ca_certs": "/ca.pem", "ssl_certfile": "/c.pem", "ssl_keyfile": "/k.pem"},
        ),
    ],
)
def test_the_client_understands_the_url_and_takes_its_options(url: str, expected: dict[str, Any]) -> None:
    redis_url = parse_url(url).redis_url
    assert redis_url is not None
    pool = redis.ConnectionPool.from_url(redis_url)
    pool.make_connection()  # an option that its connection does not take would be a TypeError
    assert {name: pool.connection_kwargs.get(name) for name in expected} == expected
    assert "prefix" not in pool.connection_kwargs


def test_a_relative_socket_path_starts_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    location = parse_url("unix:run/v.sock")
    assert location.address == str(tmp_path / "run/v.sock")
    assert location.redis_url == f"unix://{tmp_path}/run/v.sock"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("embedded:data.valkey", "{cwd}/data.valkey"),
        ("embedded:some/../data", "{cwd}/data"),
        ("embedded:/var/data", "/var/data"),
        ("embedded:///var/data", "/var/data"),
        ("embedded://data", "{cwd}/data"),
        ("embedded:~/data", "{home}/data"),
        ("embedded://~/data", "{home}/data"),
        ("embedded:a#b@c:d", "{cwd}/a#b@c:d"),
        ("EMBEDDED:data", "{cwd}/data"),
    ],
)
def test_an_embedded_url_names_a_folder(
    url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    location = parse_url(url)
    assert location.embedded_path == path.format(cwd=os.getcwd(), home="/home/somebody")
    assert location.address == f"embedded:{location.embedded_path}"
    assert location.redis_url is None


@pytest.mark.parametrize("base", ["redis://host/0", "unix:///run/v.sock", "embedded:data"])
def test_the_prefix_is_the_arguments_then_the_urls_then_the_default(base: str) -> None:
    assert parse_url(base).prefix == "optuna"
    assert parse_url(base + "?prefix=team:a").prefix == "team:a"
    assert parse_url(base + "?prefix=a%2Fb").prefix == "a/b"
    assert parse_url(base + "?prefix=a", prefix="b").prefix == "b"
    assert parse_url(base, prefix="b").prefix == "b"


@pytest.mark.parametrize("base", ["redis://host/0", "unix:///run/v.sock", "embedded:data"])
@pytest.mark.parametrize("prefix", ["", "a b", "{a}", "a}", "a\tb", "a\nb"])
def test_a_prefix_that_would_break_key_names_is_refused(base: str, prefix: str) -> None:
    with pytest.raises(InvalidURLError, match="prefix"):
        parse_url(base, prefix=prefix)
    with pytest.raises(InvalidURLError, match="prefix"):
        parse_url(base + "?prefix=" + prefix.replace("\t", "%09").replace("\n", "%0A"))


def test_without_a_url_the_environment_decides_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, "redis://elsewhere:7000/1?prefix=p")
    assert (parse_url(None).address, parse_url(None).prefix) == ("elsewhere:7000", "p")
    assert parse_url("redis://here").address == "here:6379"
    monkeypatch.setenv(URL_VARIABLE, "")
    assert parse_url(None).embedded_path == os.path.abspath("optuna.valkey")
    monkeypatch.delenv(URL_VARIABLE)
    assert parse_url(None) == parse_url(DEFAULT_URL)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "unknown storage URL"),
        (":", "unknown storage URL"),
        ("host", "unknown storage URL"),
        ("localhost:6379", "unknown storage URL 'localhost:6379'"),
        ("sqlite:///study.db", "unknown storage URL"),
        ("redis+sentinel://a:26379/mymaster/0", "unknown storage URL"),
        ("redis://", "no host"),
        ("redis:/host", "no host"),
        ("redis:///0", "no host"),
        ("redis://:6379", "no host"),
        ("keydb://a:6373,b:6374/0", "several masters"),
        ("keydb://u:p@a:6373,u:p@b:6374/0", "several masters"),
        ("redis://host:x", "bad port"),
        ("redis://host:65536", "bad port"),
        ("redis://host:-1", "bad port"),
        ("redis://[::1", "host"),
        ("redis://host/x", "database number"),
        ("redis://host/-1", "database number"),
        ("redis://host/0/1", "database number"),
        ("redis://host?db=x", "database"),
        ("redis://host?db=-1", "database"),
        ("redis://host?db=", "database"),
        ("redis://host?socket_timeot=3", "unknown option 'socket_timeot'"),
        ("redis://host?decode_responses=1", "unknown option 'decode_responses'"),
        ("redis://host?protocol=3", "unknown option 'protocol'"),
        ("redis://host?ssl_ca_certs=/ca.pem", "unknown option 'ssl_ca_certs'"),
        ("redis://host?socket_timeout=soon", "socket_timeout"),
        ("redis://host?socket_timeout=0", "socket_timeout"),
        ("redis://host?socket_connect_timeout=inf", "socket_connect_timeout"),
        ("redis://host?socket_connect_timeout=nan", "socket_connect_timeout"),
        ("redis://host/0#1", "%23"),
        ("unix://", "no socket path"),
        ("unix:///", "no socket path"),
        ("unix://run/v.sock", "no socket path"),
        ("unix:///run/v#1.sock", "%23"),
        ("unix:///run/v.sock?socket_keepalive=1", "unknown option 'socket_keepalive'"),
        ("embedded:", "names a folder"),
        ("embedded://", "names a folder"),
        ("embedded:?prefix=a", "names a folder"),
        ("embedded:data?db=1", "names a folder"),
        ("embedded:data?colour=1", "unknown option 'colour'"),
    ],
)
def test_a_mistake_is_named(url: str, said: str) -> None:
    with pytest.raises(InvalidURLError) as caught:
        parse_url(url)
    assert said in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, DLockError)
    assert isinstance(caught.value.__dict__["url"], str)


@pytest.mark.parametrize("url", [b"redis://host", 6379, ["redis://a", "redis://b"], Path("data")])
def test_what_is_not_a_string_is_refused_with_its_type(url: Any) -> None:
    with pytest.raises(InvalidURLError, match=type(url).__name__):
        parse_url(url)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host:6379/0",
        f"redis://bob:{SECRET}@host",
        f"redis://:x@{SECRET}@host",
        f"redis://host?password={SECRET}",
        f"unix://:{SECRET}@/run/v.sock",
        f"unix:///run/v.sock?password={SECRET}",
    ],
)
def test_the_password_is_for_the_client_only(url: str) -> None:
    location = parse_url(url)
    assert location.redis_url is not None
    assert SECRET in location.redis_url
    assert SECRET not in repr(location) + str(location) + location.address + f"{location!s:>1}"
    assert pickle.loads(pickle.dumps(location)) == location


@pytest.mark.parametrize(
    "url",
    [
        # the mistake is elsewhere
        f"redis://:{SECRET}@host:6379/x",
        f"redis://:{SECRET}@host:99999",
        f"redis://bob:{SECRET}@host?colour=1",
        f"redis://bob:{SECRET}@host?prefix=",
        f"redis://bob:{SECRET}@host?prefix=a@b&db=x",
        f"redis://bob:{SECRET}@host?socket_timeout=x",
        f"redis://bob:{SECRET}@",
        f"redis://bob:{SECRET}@[::1/0",
        f"redis://bob:{SECRET}@a,b",
        f"redis://bob:{SECRET}@a,bob:{SECRET}@b/0",
        f"redis://host/x?password={SECRET}",
        f"redis://host?password={SECRET}&colour=1",
        f"redis://host?prefix=&password={SECRET}",
        f"embedded:data?password={SECRET}",
        f"unix://:{SECRET}@host/run/v.sock",
        # the scheme is unknown, or its slashes are missing
        f"http://bob:{SECRET}@host",
        f"redis:bob:{SECRET}@host",
        f"http:bob:{SECRET}@host",
        f"bob:{SECRET}@host",
        f"redis:/bob:{SECRET}@host",
        # the password itself is the mistake
        f"redis://bob:{SECRET}/x@host",
        f"redis://bob:{SECRET}#x@host",
        f"redis://bob:x#{SECRET}@host",
        f"redis://bob:{SECRET}?x@host",
        f"redis://bob:x?{SECRET}@host",
        f"redis://bob:x/{SECRET}@host",
        f"redis://host?password=x&{SECRET}",
        f"redis://host?PASSWORD={SECRET}",
        f"redis://host?passwort={SECRET}",
        f"redis://host?pwd={SECRET}",
        # the host was forgotten
        f"redis://bob:{SECRET}",
        f"redis://:{SECRET}/0",
    ],
)
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(InvalidURLError) as caught:
        parse_url(url)
    error = caught.value
    assert SECRET not in f"{error} {error!r} {error.__dict__}"
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize(
    ("url", "split"),
    [
        ("redis://h:1/0", ["redis://h:1/0"]),
        (
            "keydb://u:p@m1:1,m2:2/3?prefix=x",
            ["keydb://u:p@m1:1/3?prefix=x", "keydb://u:p@m2:2/3?prefix=x"],
        ),
        ("valkeys://m1,[::1]:2", ["valkeys://m1", "valkeys://[::1]:2"]),
        ("unix:///a,b.sock", ["unix:///a,b.sock"]),
        ("embedded:a,b", ["embedded:a,b"]),
    ],
)
def test_a_url_of_several_masters_is_one_url_for_each(url: str, split: list[str]) -> None:
    assert split_url(url) == split


def test_several_masters_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, "keydb://m2:1,m1:2/0?prefix=p")
    server = server_of_url(None, None)
    assert [master.address for master in server.masters] == ["m1:2", "m2:1"]
    assert server.prefix == "p"
    monkeypatch.delenv(URL_VARIABLE)
    assert split_url(None) == [DEFAULT_URL]


def test_users_named_more_than_once_are_refused_and_not_shown() -> None:
    with pytest.raises(InvalidURLError, match="more than once") as caught:
        split_url(f"redis://bob:{SECRET}@a,bob:{SECRET}@b/0")
    assert SECRET not in str(caught.value)


# -- the password in a file --------------------------------------------------------------------------


def _client_options(url: str) -> dict[str, Any]:
    redis_url = parse_url(url).redis_url
    assert redis_url is not None
    return dict(redis.ConnectionPool.from_url(redis_url).connection_kwargs)


@pytest.mark.parametrize("base", ["redis://host:7000/2", "rediss://bob@host", "unix:///run/v.sock"])
@pytest.mark.parametrize("content", [SECRET, SECRET + "\n", SECRET + "\r\n"])
def test_a_password_comes_from_the_file_that_is_named(base: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "pass word").write_bytes(content.encode())
    location = parse_url(f"{base}?password_file={tmp_path}/pass%20word&prefix=p")
    options = _client_options(f"{base}?password_file={tmp_path}/pass%20word&prefix=p")
    assert options["password"] == SECRET
    assert options.get("username") == ("bob" if "bob" in base else None)
    assert "password_file" not in options
    assert location.prefix == "p"
    assert SECRET not in repr(location) + location.address


def test_a_password_in_a_file_needs_no_percent_signs(tmp_path: Path) -> None:
    content = " a/b@c:d?e#f&g%20+h=ü "
    (tmp_path / "p").write_text(content, "utf-8")
    options = _client_options(f"redis://host?password_file={tmp_path}/p")
    assert options["password"] == content


def test_one_password_file_holds_for_all_masters(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(SECRET)
    for url in split_url(f"keydb://m1:1,m2:2/0?password_file={tmp_path}/p"):
        assert _client_options(url)["password"] == SECRET


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read password_file '.*/p': No such file"), (b"", "is empty"), (b"\n", "is empty")],
)
def test_a_password_file_that_gives_none_is_a_mistake(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "p").write_bytes(content)
    with pytest.raises(InvalidURLError, match=said):
        parse_url(f"redis://host?password_file={tmp_path}/p")


@pytest.mark.parametrize("url", [f"redis://:{SECRET}@host?", f"redis://host?password={SECRET}&"])
def test_a_password_and_a_password_file_are_one_too_many(url: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("other")
    with pytest.raises(InvalidURLError, match="both a password and a password_file") as caught:
        parse_url(f"{url}password_file={tmp_path}/p")
    assert SECRET not in f"{caught.value} {caught.value.__dict__}"


def test_a_password_file_of_other_bytes_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(SECRET.encode() + b"\xff")
    with pytest.raises(InvalidURLError, match="no UTF-8") as caught:
        parse_url(f"redis://host?password_file={tmp_path}/p")
    assert SECRET not in f"{caught.value!r}"
    assert caught.value.__suppress_context__
