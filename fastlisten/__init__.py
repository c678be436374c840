"""Listening sockets with the accept loop in Cython over raw POSIX and Winsock calls."""

from fastlisten._endpoint import Endpoint, HostEntry, get_host_entry, get_host_name

__all__ = [
    "Endpoint",
    "HostEntry",
    "get_host_entry",
    "get_host_name",
]
