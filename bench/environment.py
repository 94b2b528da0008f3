"""What a figure was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import redis

_PACKAGES = ("optuna", "redis", "hiredis", "optuna-dlock", "pottery", "SQLAlchemy")


def describe(redis_url: str) -> dict[str, str]:
    """Machine, versions and server, as ordered name and text."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{len(cpus())} x {_cpu_model()}",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["server"] = _server(redis_url)
    found["url"] = redis_url.partition(":")[0] + " over " + _transport(redis_url)
    return found


def cpus() -> list[int]:
    """The CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _transport(url: str) -> str:
    if url.startswith("unix"):
        return "a unix socket"
    return "TCP loopback" if is_loopback(url) else "TCP"


def is_loopback(url: str) -> bool:
    """Whether the server of a URL runs on this machine, as far as the URL tells."""
    host = url.partition("://")[2].rpartition("@")[2]
    return url.startswith("unix") or host.startswith(("127.", "localhost", "[::1]"))


def _server(url: str) -> str:
    with redis.Redis.from_url(url) as client:
        info = client.info()
        persistence = client.config_get("save", "appendonly")
    name = "valkey" if "valkey_version" in info else str(info.get("server_name", "redis"))
    number = info.get("valkey_version", info["redis_version"])
    kept = bool(persistence.get("save")) or persistence.get("appendonly") == "yes"
    return f"{name} {number}, {'with' if kept else 'without'} persistence"
