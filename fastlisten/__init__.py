"""Listening sockets, with the accept loop in Cython over raw POSIX and Winsock calls."""

import typing

try:
    from fastlisten._bind import bind, create_server
    from fastlisten._core.connection import Connection
    from fastlisten._endpoint import Endpoint, HostEntry, get_host_entry, get_host_name
    from fastlisten._listener import Listener, ListenerStats, PendingTimes, ServeResult
    from fastlisten._serve import serve
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("fastlisten._core"):
        raise
    raise ImportError(
        f"{__path__[0]} is fastlisten's source, without the extension modules of this Python. Leave that "
        "directory to import the fastlisten that is installed, or build them there: pip install -e .",
        name=error.name,
        path=error.path,
    ) from error

if typing.TYPE_CHECKING:
    from fastlisten._admission import Admission, AdmissionStats
    from fastlisten._core.proxy_header import ProxyHeader, ProxySSL
    from fastlisten._inherited import inherited
    from fastlisten._notify import Notifier
    from fastlisten._patch import patch, unpatch
    from fastlisten._proxy import Proxy
    from fastlisten._tls import TLSConnection, reloading
    from fastlisten._workers.child import Worker, worker
    from fastlisten._workers.totals import WorkersStats
    from fastlisten._workers.workers import Workers

__version__ = "0.1.0"

__all__ = [
    "Admission",
    "AdmissionStats",
    "Connection",
    "Endpoint",
    "HostEntry",
    "Listener",
    "ListenerStats",
    "Notifier",
    "PendingTimes",
    "Proxy",
    "ProxyHeader",
    "ProxySSL",
    "ServeResult",
    "TLSConnection",
    "Worker",
    "Workers",
    "WorkersStats",
    "bind",
    "create_server",
    "get_host_entry",
    "get_host_name",
    "inherited",
    "patch",
    "reloading",
    "serve",
    "unpatch",
    "worker",
]


# Imported when it is asked for: who has none of it does not pay for it.
_LATER = {
    "Notifier": "fastlisten._notify",
    "Admission": "fastlisten._admission",
    "AdmissionStats": "fastlisten._admission",
    "Proxy": "fastlisten._proxy",
    "ProxyHeader": "fastlisten._core.proxy_header",
    "ProxySSL": "fastlisten._core.proxy_header",
    "TLSConnection": "fastlisten._tls",
    "Worker": "fastlisten._workers.child",
    "Workers": "fastlisten._workers.workers",
    "WorkersStats": "fastlisten._workers.totals",
    "inherited": "fastlisten._inherited",
    "patch": "fastlisten._patch",
    "reloading": "fastlisten._tls",
    "unpatch": "fastlisten._patch",
    "worker": "fastlisten._workers.child",
}

if not typing.TYPE_CHECKING:  # or a type checker would believe that every name is there

    def __getattr__(name: str) -> object:
        if name not in _LATER and name != "metrics":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        if name == "metrics":
            return import_module("fastlisten.metrics")
        found = globals()[name] = getattr(import_module(_LATER[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
