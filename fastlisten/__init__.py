"""Listening sockets, with the accept loop in Cython over raw POSIX and Winsock calls."""

from fastlisten._bind import bind, create_server, serve
from fastlisten._core.connection import Connection
from fastlisten._endpoint import Endpoint, HostEntry, get_host_entry, get_host_name
from fastlisten._listener import Listener, ListenerStats, ServeResult
from fastlisten._patch import patch, unpatch
from fastlisten._tls import TLSConnection, reloading

__version__ = "0.1.0"

__all__ = [
    "Connection",
    "Endpoint",
    "HostEntry",
    "Listener",
    "ListenerStats",
    "ServeResult",
    "TLSConnection",
    "bind",
    "create_server",
    "get_host_entry",
    "get_host_name",
    "patch",
    "reloading",
    "serve",
    "unpatch",
]
